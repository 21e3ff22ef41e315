/* What vllm-ascend's C extension asks for beyond the CANN runtime, so that it loads and registers its op schemas.
 *
 * Its kernels are never run (their place is taken in Python), so nearly everything here may only be there: a function
 * that is called nevertheless ends the process and says its name.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void never(const char *name) {
  fprintf(stderr, "emulator: %s was called, which the emulated CANN does not have\n", name);
  abort();
}
#define ABSENT(name) void name(void) { never(#name); }

int strcpy_s(char *to, size_t room, const char *from) { strncpy(to, from, room); return 0; }

/* The extension is built for torch 2.10; in 2.13 two functions of the same arguments have other names. */
#if defined(__aarch64__)
#define RENAMED(old, new) __asm__(".globl " #old "\n.type " #old ",@function\n" #old ": b " #new "\n");
#else
#define RENAMED(old, new) __asm__(".globl " #old "\n.type " #old ",@function\n" #old ": jmp " #new "@PLT\n");
#endif
RENAMED(_ZNR5torch7Library4_defEON3c1014FunctionSchemaEPNS1_12OperatorNameERKSt6vectorIN2at3TagESaIS8_EENS_17_RegisterOrVerifyE,
        _ZNR5torch7Library4_defEON3c1014FunctionSchemaEPNS1_12OperatorNameERKSt6vectorINS_10headeronly3TagESaIS8_EENS_17_RegisterOrVerifyE)
RENAMED(_ZN3c104impl3cow23materialize_cow_storageERNS_11StorageImplE,
        _ZN3c104impl3cow15materialize_cowEPNS_11StorageImplE)

ABSENT(CheckLogLevel)
ABSENT(MsprofStr2Id)
ABSENT(mmGetTid)
ABSENT(rtFunctionGetMetaInfo)
ABSENT(rtFunctionGetMetaInfoSize)
ABSENT(_ZN2fe13PlatFormInfos13GetLocalMemBwERKNS_12LocalMemTypeERm)
ABSENT(_ZN2fe13PlatFormInfos15GetLocalMemSizeERKNS_12LocalMemTypeERm)
ABSENT(_ZN2fe13PlatFormInfos20SetCoreNumByCoreTypeERKSs)
ABSENT(_ZN2fe13PlatFormInfos22GetPlatformResWithLockERKSsS2_RSs)
ABSENT(_ZN2fe19PlatformInfoManager24InitRuntimePlatformInfosERKSs)
ABSENT(_ZN2fe19PlatformInfoManager31GetRuntimePlatformInfosByDeviceERKjRNS_13PlatFormInfosEb)
ABSENT(_ZN2fe19PlatformInfoManager8InstanceEv)
ABSENT(_ZNK2fe13PlatFormInfos10GetCoreNumEv)

