/* LD_PRELOAD: writes each look-up of a host and each connection to the file in NETWORK_LOG, and lets none happen. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *whom) {
    const char *path = getenv("NETWORK_LOG");
    int file = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (file < 0) return;
    dprintf(file, "%s %s\n", what, whom ? whom : "?");
    close(file);
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    (void)service; (void)hints; (void)found;
    note("look-up", node);
    return EAI_NONAME;
}

struct hostent *gethostbyname(const char *name) {
    note("look-up", name);
    return NULL;
}

static int outside(const struct sockaddr *address, const char *what) {
    char text[64] = "?";
    if (!address || (address->sa_family != AF_INET && address->sa_family != AF_INET6)) return 0;
    const void *place = address->sa_family == AF_INET ? (const void *)&((const struct sockaddr_in *)address)->sin_addr
                                                      : (const void *)&((const struct sockaddr_in6 *)address)->sin6_addr;
    inet_ntop(address->sa_family, place, text, sizeof text);
    note(what, text);
    return 1;
}

int connect(int socket, const struct sockaddr *address, socklen_t length) {
    if (outside(address, "connect")) { errno = ENETUNREACH; return -1; }
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    return real(socket, address, length);
}

ssize_t sendto(int socket, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length) {
    if (outside(address, "send")) { errno = ENETUNREACH; return -1; }
    ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    return real(socket, data, size, flags, address, length);
}
