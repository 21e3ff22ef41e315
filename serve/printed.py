"""`--print-config`: everything a start was told and decides, as a file that `--config` takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import serve.args
from serve.engine_flags import read_flags
from serve.planning.page import config_file
from serve.resolve import Resolved, engine_version
from serve.settings import LaunchSettings

# Fields that no file holds, or that the plan's part of it has.
NOT_THERE = ("profile", "config", "print_config", "dry_run", "forget_isolated", "engine_flags", "environment")


def config_text(settings: LaunchSettings, resolved: Resolved) -> str:
    """Return the file: the launcher's own settings, then the plan with its reasons, the user's engine flags in it."""
    given = read_flags(
        settings.engine, engine_version(settings, resolved.device), resolved.device, settings.engine_flags
    )
    plan = replace(
        resolved.plan,
        settings={**resolved.plan.settings, **given},
        environment={**resolved.plan.environment, **settings.environment},
    )
    default = serve.args.parse([])
    own: dict[str, Any] = {}
    for name, value in vars(settings).items():
        if name not in NOT_THERE and value != getattr(default, name):
            own[name.replace("_", "-")] = value if isinstance(value, (bool, int, float)) else str(value)
    return config_file(plan, own, given)
