// A CUDA without a GPU: libcuda and libcudart over malloc. Work is queued and only done when somebody waits for it, so
// that whoever reads a buffer too early reads old bytes; a stream that is captured records its work instead.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void (*work_t)(void);
typedef struct { int recorded; void *target; const void *source; size_t bytes; work_t work; } op_t;
typedef struct { op_t *ops; int count, capacity, capturing; } list_t;       // a stream, or a graph

static char log_text[1 << 20];
static char failing[64];
static int fail_code, fail_after, live_device, live_host, live_streams, live_graphs, version = FAKE_VERSION;
static int device_count = 1, integrated = 0;
static list_t *streams[64];

static int called(const char *name) {
    if (strlen(log_text) + strlen(name) + 2 < sizeof log_text) { strcat(log_text, name); strcat(log_text, " "); }
    if (strcmp(name, failing) == 0 && fail_after-- <= 0) return fail_code;
    return 0;
}
#define CALLED(name) do { int code = called(name); if (code) return code; } while (0)

static void push(list_t *list, op_t op) {
    if (list->count == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 8;
        list->ops = realloc(list->ops, list->capacity * sizeof(op_t));
    }
    list->ops[list->count++] = op;
}
static void perform(const list_t *list) {
    for (int i = 0; i < list->count; i++) {
        if (list->ops[i].work) list->ops[i].work();
        else memmove(list->ops[i].target, list->ops[i].source, list->ops[i].bytes);
    }
}

// Handles for the tests.
const char *fake_log(void) { return log_text; }
void fake_reset(void) {
    log_text[0] = failing[0] = 0; device_count = 1; integrated = 0; version = FAKE_VERSION;
    live_device = live_host = live_streams = live_graphs = 0;
    for (int i = 0; i < 64; i++) streams[i] = NULL;
}
void fake_fail(const char *name, int code, int after) { strcpy(failing, name); fail_code = code; fail_after = after; }
void fake_device(int count, int is_integrated, int cuda) { device_count = count; integrated = is_integrated; version = cuda; }
int fake_live(int kind) { int all[] = {live_device, live_host, live_streams, live_graphs}; return all[kind]; }
void fake_enqueue(void *stream, work_t work) { push(stream, (op_t){.work = work}); }
int fake_capturing(void *stream) { return ((list_t *)stream)->capturing; }

// libcuda
int cuInit(unsigned flags) { CALLED("cuInit"); return 0; }
int cuDeviceGetCount(int *count) { CALLED("cuDeviceGetCount"); *count = device_count; return 0; }
int cuDriverGetVersion(int *value) { CALLED("cuDriverGetVersion"); *value = version; return 0; }
int cuDeviceGet(int *device, int number) { CALLED("cuDeviceGet"); *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { CALLED("cuDeviceGetName"); strncpy(name, "Orin", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { CALLED("cuDeviceTotalMem_v2"); *bytes = (size_t)8 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALLED("cuDeviceGetAttribute");
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18 ? integrated : -1;
    return 0;
}
int cuGetErrorString(int code, const char **text) { *text = code == 803 ? "system has unsupported display driver" : "no device"; return 0; }

// libcudart
int cudaRuntimeGetVersion(int *value) { CALLED("cudaRuntimeGetVersion"); *value = FAKE_VERSION; return 0; }
const char *cudaGetErrorName(int code) { return code == 2 ? "cudaErrorMemoryAllocation" : code == 900 ? "cudaErrorStreamCaptureUnsupported" : "cudaErrorFake"; }
const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "as asked"; }
int cudaGetLastError(void) { called("cudaGetLastError"); return 0; }
int cudaMemGetInfo(size_t *free_, size_t *total) { CALLED("cudaMemGetInfo"); *free_ = 64 << 20; *total = (size_t)8 << 30; return 0; }
int cudaMalloc(void **made, size_t bytes) { CALLED("cudaMalloc"); *made = malloc(bytes); memset(*made, 0xA5, bytes); live_device++; return 0; }
int cudaFree(void *address) { CALLED("cudaFree"); free(address); live_device--; return 0; }
int cudaHostAlloc(void **made, size_t bytes, unsigned flags) {
    CALLED("cudaHostAlloc");
    if (!(flags & 2)) return 1;
    *made = malloc(bytes); memset(*made, 0x5A, bytes); live_host++; return 0;
}
int cudaFreeHost(void *address) { CALLED("cudaFreeHost"); free(address); live_host--; return 0; }
int cudaHostGetDevicePointer(void **made, void *host, unsigned flags) { CALLED("cudaHostGetDevicePointer"); *made = host; return flags ? 1 : 0; }
int cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, void *stream) {
    CALLED("cudaMemcpyAsync");
    if (kind != 4 || !stream) return 1;
    push(stream, (op_t){.target = target, .source = source, .bytes = bytes});
    return 0;
}
int cudaStreamCreateWithFlags(void **made, unsigned flags) {
    CALLED("cudaStreamCreateWithFlags");
    if (flags != 1) return 1;
    *made = calloc(1, sizeof(list_t)); live_streams++;
    for (int i = 0; i < 64; i++) if (!streams[i]) { streams[i] = *made; break; }
    return 0;
}
int cudaStreamSynchronize(void *stream) {
    CALLED("cudaStreamSynchronize");
    if ((uintptr_t)stream <= 2) return 0;           // the default streams of other libraries: nothing is queued there
    list_t *list = stream;
    if (list->capturing) return 900;
    perform(list); list->count = 0;
    return 0;
}
int cudaStreamDestroy(void *stream) {
    CALLED("cudaStreamDestroy");
    for (int i = 0; i < 64; i++) if (streams[i] == stream) streams[i] = NULL;
    free(((list_t *)stream)->ops); free(stream); live_streams--; return 0;
}
int cudaStreamBeginCapture(void *stream, int mode) {
    CALLED("cudaStreamBeginCapture");
    list_t *list = stream;
    if (mode != 1 || list->capturing || list->count) return 901;
    list->capturing = 1; return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
    int code = called("cudaStreamEndCapture");
    list_t *list = stream, *made = calloc(1, sizeof(list_t));
    *made = *list; made->capturing = 0;
    memset(list, 0, sizeof *list);
    if (code) { free(made); return code; }
    *graph = made; live_graphs++; return 0;
}
#if FAKE_VERSION < 12000
int cudaGraphInstantiate(void **made, void *graph, void **node, char *text, size_t size) {
    CALLED("cudaGraphInstantiate");
    if (node || text || size) return 1;
#else
int cudaGraphInstantiate(void **made, void *graph, unsigned long long flags) {
    CALLED("cudaGraphInstantiate");
    if (flags) return 1;
#endif
    list_t *copy = calloc(1, sizeof(list_t)), *list = graph;
    for (int i = 0; i < list->count; i++) push(copy, list->ops[i]);
    *made = copy; live_graphs++; return 0;
}
int cudaGraphDestroy(void *graph) { CALLED("cudaGraphDestroy"); free(((list_t *)graph)->ops); free(graph); live_graphs--; return 0; }
int cudaGraphExecDestroy(void *graph) { CALLED("cudaGraphExecDestroy"); free(((list_t *)graph)->ops); free(graph); live_graphs--; return 0; }
int cudaGraphLaunch(void *graph, void *stream) {
    CALLED("cudaGraphLaunch");
    list_t *list = graph;
    for (int i = 0; i < list->count; i++) push(stream, list->ops[i]);
    return 0;
}
