/* A stand-in for the CANN runtime: what torch_npu calls, answered on a machine without an Ascend card.
 *
 * Device memory is host memory, a stream does its work at once, eight cards are reported. Every other function of the
 * runtime that torch_npu names is made from a list beside this file (runtime.py): either it does nothing, or it fails and
 * says its name. Graphs and collectives are handed to Python through two hooks.
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, FAILED = 507899, UNSUPPORTED = 207000, OUT_OF_MEMORY = 207001, CARDS = 8 };
static const size_t TOTAL = 64ull << 30, FREE = 61ull << 30; /* a 910B3: 64 GiB installed, 61 handed out */

static __thread int card = 0;
static size_t used[CARDS];
static char message[1024];

/* Blocks remember their card and size in the 64 bytes before them. */
typedef struct { int card; size_t bytes; void *base; } Block;

typedef long (*GraphHook)(const char *what, void *object, void *stream);
typedef int (*CollectiveHook)(const char *what, void *comm, void *send, void *receive, const uint64_t *numbers);
static GraphHook graph_hook;
typedef int (*ValueHook)(const char *what, void *address, uint64_t value, uint32_t mode);
static CollectiveHook collective_hook;
static ValueHook value_hook;
static int capturing;

void emulator_set_hooks(GraphHook graphs, CollectiveHook collectives, ValueHook values) {
  graph_hook = graphs;
  collective_hook = collectives;
  value_hook = values;
}

int emulator_unsupported(const char *name) {
  snprintf(message, sizeof message, "the emulated CANN runtime has no %s", name);
  if (getenv("ASCEND_EMULATOR_TRACE")) fprintf(stderr, "emulator: %s\n", message); /* torch_npu takes some as a hint */
  return UNSUPPORTED;
}

int emulator_fail(const char *why) {
  snprintf(message, sizeof message, "emulated device: %s", why);
  return FAILED;
}

static long tell(const char *what, void *object, void *stream) {
  return graph_hook ? graph_hook(what, object, stream) : 0;
}

const char *aclGetRecentErrMsg(void) { return message; }

/* Cards */
int aclsysGetVersionStr(const char *package, char *version) { strcpy(version, "9.1.0"); return OK; }
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
int aclrtGetDeviceCount(uint32_t *count) { const char *given = getenv("ASCEND_EMULATOR_CARDS"); *count = given ? atoi(given) : CARDS; return OK; }
int aclrtSetDevice(int index) { card = index; return OK; }
int aclrtGetDevice(int *index) { *index = card; return OK; }
int aclrtGetLogicDevIdByUserDevId(int user, int *logic) { *logic = user; return OK; }
int aclrtGetCurrentContext(void **context) { static char contexts[CARDS]; *context = &contexts[card]; return OK; }
int aclrtGetPrimaryCtxState(int index, uint32_t *flags, int *active) { *flags = 0; *active = 1; return OK; }
int aclrtDeviceCanAccessPeer(int *can, int index, int peer) { *can = 1; return OK; }
size_t aclGetCompileoptSize(int option) { return 16; }
int aclGetCompileopt(int option, char *value, size_t size) { strncpy(value, "0", size); return OK; }
int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { *flag = 0; return OK; }

/* Memory */
int aclrtMalloc(void **pointer, size_t bytes, int policy) {
  if (__sync_add_and_fetch(&used[card], bytes) > FREE) {
    __sync_sub_and_fetch(&used[card], bytes);
    return OUT_OF_MEMORY;
  }
  char *base = NULL;
  if (posix_memalign((void **)&base, 512, bytes + 1024)) return OUT_OF_MEMORY;
  *(Block *)(base + 448) = (Block){card, bytes, base};
  *pointer = base + 512;
  return OK;
}
int aclrtMallocAlign32(void **pointer, size_t bytes, int policy) { return aclrtMalloc(pointer, bytes, policy); }
int aclrtFree(void *pointer) {
  if (!pointer) return OK;
  Block block = *(Block *)((char *)pointer - 64);
  __sync_sub_and_fetch(&used[block.card], block.bytes);
  free(block.base);
  return OK;
}
int aclrtMallocHost(void **pointer, size_t bytes) { *pointer = malloc(bytes); return *pointer ? OK : OUT_OF_MEMORY; }
int aclrtMallocHostWithCfg(void **pointer, uint64_t bytes, void *config) { return aclrtMallocHost(pointer, bytes); }
int aclrtFreeHost(void *pointer) { free(pointer); return OK; }
int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) { *unused = FREE - used[card]; *total = TOTAL; return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) { memcpy(to, from, bytes); return OK; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) { memcpy(to, from, bytes); return OK; }
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) { memcpy(to, from, bytes); return OK; }
int aclrtMemset(void *to, size_t room, int value, size_t bytes) { memset(to, value, bytes); return OK; }
int aclrtMemsetAsync(void *to, size_t room, int value, size_t bytes, void *stream) { memset(to, value, bytes); return OK; }

/* Streams and events: work is done when it is given, so an event is a moment on the host's clock. */
static int new_stream(void **stream) { static int32_t number; int32_t *id = malloc(64); *id = __sync_add_and_fetch(&number, 1); *stream = id; return OK; }
int aclrtCreateStream(void **stream) { return new_stream(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return new_stream(stream); }
int aclrtDestroyStream(void *stream) { free(stream); return OK; }
int aclrtDestroyStreamForce(void *stream) { free(stream); return OK; }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = stream ? *(int32_t *)stream : 0; return OK; }
int aclrtStreamQuery(void *stream, int *done) { *done = 1; return OK; }
static int new_event(void **event) { *event = calloc(1, 64); return OK; }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return new_event(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return new_event(event); }
int aclrtDestroyEvent(void *event) { free(event); return OK; }
int aclrtRecordEvent(void *event, void *stream) { clock_gettime(CLOCK_MONOTONIC, event); return OK; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return OK; }
int aclQueryEventRecordedStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtEventElapsedTime(float *ms, void *start, void *end) {
  const struct timespec *a = start, *b = end;
  *ms = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) * 1e-6f;
  return OK;
}
static int synchronise(const char *what) { return tell(what, NULL, NULL); }
int aclrtSynchronizeStream(void *stream) { return synchronise("aclrtSynchronizeStream"); }
int aclrtSynchronizeStreamWithTimeout(void *stream, int timeout) { return synchronise("aclrtSynchronizeStream"); }
int aclrtSynchronizeDevice(void) { return synchronise("aclrtSynchronizeDevice"); }
int aclrtSynchronizeDeviceWithTimeout(int timeout) { return synchronise("aclrtSynchronizeDevice"); }
int aclrtSynchronizeEvent(void *event) { return synchronise("aclrtSynchronizeEvent"); }

/* Captured graphs: Python keeps what was captured, under the number that stands for the graph here. */
int aclmdlRICaptureBegin(void *stream, int mode) { capturing = 1; return tell("capture_begin", NULL, stream); }
int aclmdlRICaptureEnd(void *stream, void **graph) { capturing = 0; *graph = (void *)tell("capture_end", NULL, stream); return OK; }
int aclmdlRICaptureGetInfo(void *stream, int *status, void **graph) { *status = capturing; *graph = (void *)tell("graph", NULL, stream); return OK; }
int aclmdlRICaptureThreadExchangeMode(int *mode) { return OK; }
int aclmdlRIExecuteAsync(void *graph, void *stream) { return tell("execute", graph, stream); }
int aclmdlRIGetId(void *graph, uint32_t *id) { *id = (uint32_t)(uintptr_t)graph; return OK; }
int aclmdlRIDestroy(void *graph) { return tell("destroy", graph, NULL); }
int aclmdlRICaptureTaskGrpBegin(void *stream) { return tell("group_begin", NULL, stream); }
int aclmdlRICaptureTaskGrpEnd(void *stream, void **group) { *group = (void *)tell("group_end", NULL, stream); return OK; }
int aclmdlRICaptureTaskUpdateBegin(void *stream, void *group) { return tell("update_begin", group, stream); }
int aclmdlRICaptureTaskUpdateEnd(void *stream) { return tell("update_end", NULL, stream); }

/* External events are values in memory that a stream waits for: part of a graph while one is captured. */
int aclrtValueWait(void *address, uint64_t value, uint32_t mode, void *stream) {
  return value_hook ? value_hook("wait", address, value, mode) : emulator_unsupported("aclrtValueWait");
}
int aclrtValueWrite(void *address, uint64_t value, uint32_t flag, void *stream) {
  return value_hook ? value_hook("write", address, value, flag) : emulator_unsupported("aclrtValueWrite");
}

/* Collectives. `numbers` is count, data type, and what the operation needs besides. */
enum { ROOT_INFO_BYTES = 4108 };
#define CALL(what, comm, send, receive, ...) \
  (collective_hook ? collective_hook(what, comm, (void *)(send), (void *)(receive), (const uint64_t[5]){__VA_ARGS__}) \
                   : emulator_unsupported("Hccl" what))
int HcclGetRootInfo(void *info) { memset(info, 0, ROOT_INFO_BYTES); return CALL("root_info", NULL, info, NULL, 0); }
int HcclCommInitRootInfo(uint32_t ranks, const void *info, uint32_t rank, void **comm) {
  *comm = calloc(1, 256);
  return CALL("init", *comm, info, NULL, ranks, rank);
}
int HcclCommInitRootInfoConfig(uint32_t ranks, const void *info, uint32_t rank, const void *config, void **comm) {
  return HcclCommInitRootInfo(ranks, info, rank, comm);
}
int HcclCommDestroy(void *comm) { int failed = CALL("destroy", comm, NULL, NULL, 0); free(comm); return failed; }
int HcclGetCommName(void *comm, char *name) { sprintf(name, "emulated_%p", comm); return OK; }
int HcclGetCommAsyncError(void *comm, int *error) { *error = 0; return OK; }
const char *HcclGetErrorString(int code) { return message; }
int HcclAllReduce(void *send, void *receive, uint64_t count, int type, int reduce, void *comm, void *stream) {
  return CALL("all_reduce", comm, send, receive, count, type, reduce);
}
int HcclBroadcast(void *data, uint64_t count, int type, uint32_t root, void *comm, void *stream) {
  return CALL("broadcast", comm, data, data, count, type, root);
}
int HcclAllGather(void *send, void *receive, uint64_t count, int type, void *comm, void *stream) {
  return CALL("all_gather", comm, send, receive, count, type);
}
int HcclReduceScatter(void *send, void *receive, uint64_t count, int type, int reduce, void *comm, void *stream) {
  return CALL("reduce_scatter", comm, send, receive, count, type, reduce);
}
int HcclAlltoAll(const void *send, uint64_t count, int type, const void *receive, uint64_t receive_count, int receive_type, void *comm, void *stream) {
  return CALL("all_to_all", comm, send, receive, count, type);
}
int HcclAlltoAllV(const void *send, const void *counts, const void *offsets, int type, const void *receive,
                  const void *receive_counts, const void *receive_offsets, int receive_type, void *comm, void *stream) {
  return CALL("all_to_all_v", comm, send, receive, (uint64_t)counts, type, (uint64_t)offsets, (uint64_t)receive_counts,
              (uint64_t)receive_offsets);
}
int HcclSend(void *data, uint64_t count, int type, uint32_t peer, void *comm, void *stream) {
  return CALL("send", comm, data, NULL, count, type, peer);
}
int HcclRecv(void *data, uint64_t count, int type, uint32_t peer, void *comm, void *stream) {
  return CALL("receive", comm, NULL, data, count, type, peer);
}
