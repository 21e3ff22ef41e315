/* Ascend Transformer Boost: what torch_npu's library of `atb` ops is linked against. The ops are computed in Python. */
#include <stdio.h>
#include <stdlib.h>

static void never(const char *name) {
  fprintf(stderr, "emulator: %s was called, which the emulated CANN does not have\n", name);
  abort();
}
#define ABSENT(name) void name(void) { never(#name); }

ABSENT(_ZN3atb13CreateContextEPPNS_7ContextE)
ABSENT(_ZN3atb14DestroyContextEPNS_7ContextE)
ABSENT(_ZN3atb15CreateOperationINS_5infer11LinearParamEEEiRKT_PPNS_9OperationE)
ABSENT(_ZN3atb15CreateOperationINS_5infer12ElewiseParamEEEiRKT_PPNS_9OperationE)
ABSENT(_ZN3atb15CreateOperationINS_5infer12RmsNormParamEEEiRKT_PPNS_9OperationE)
ABSENT(_ZN3atb15CreateOperationINS_5infer14GroupTopkParamEEEiRKT_PPNS_9OperationE)
ABSENT(_ZN3atb15CreateOperationINS_5infer18SelfAttentionParamEEEiRKT_PPNS_9OperationE)
ABSENT(_ZN3atb15CreateOperationINS_5infer19PagedAttentionParamEEEiRKT_PPNS_9OperationE)
ABSENT(_ZN3atb15CreateOperationINS_5infer20ReshapeAndCacheParamEEEiRKT_PPNS_9OperationE)
ABSENT(_ZN3atb15CreateOperationINS_5infer9RopeParamEEEiRKT_PPNS_9OperationE)
ABSENT(_ZN3atb16DestroyOperationEPNS_9OperationE)
ABSENT(_ZN3atb5Utils13GetTensorSizeERKNS_6TensorE)
