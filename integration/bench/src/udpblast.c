// udpblast: a closed loop of DNS queries over UDP with recvmmsg and sendmmsg. It costs less for a query than dnsperf, so
// that one core of load can press one core of the fastest servers. Its report has dnsperf's lines.
//
//   udpblast IP PORT NAME-FILE SECONDS SOCKETS WINDOW
//
// NAME-FILE has a name and a type on each line, as for dnsperf. WINDOW is how many queries of one socket are unanswered at
// once; a query is lost after half a second.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { MAX_SOCKETS = 64, BATCH = 64, MAX_NAME = 77, MAX_QUERY = 96 };
static const double patience = 0.5; // seconds

struct query {
  uint8_t length, octets[MAX_QUERY];
};
static struct query *queries;
static size_t query_count;

struct client {
  int fd, waiting;
  uint16_t next_id;
  float *sent_at; // by ID, seconds since the start; 0: free
};
static struct client clients[MAX_SOCKETS];

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void read_queries(const char *path) {
  FILE *f = fopen(path, "r");
  if (!f) fail(path);
  size_t room = 0;
  char line[512], name[256], type[16];
  while (fgets(line, sizeof line, f)) {
    if (sscanf(line, "%255s %15s", name, type) != 2 || strlen(name) > MAX_NAME) {
      fprintf(stderr, "udpblast: unusable line: %s", line);
      exit(1);
    }
    if (query_count == room) {
      room = room ? room * 2 : 16384;
      queries = realloc(queries, room * sizeof *queries);
      if (!queries) fail("realloc");
    }
    uint8_t *p = queries[query_count].octets;
    memset(p, 0, MAX_QUERY);
    p[2] = 1; // RD
    p[5] = 1; // one question
    size_t o = 12;
    for (char *label = strtok(name, "."); label; label = strtok(NULL, ".")) {
      size_t n = strlen(label);
      p[o++] = n;
      memcpy(p + o, label, n);
      o += n;
    }
    p[o + 2] = strcmp(type, "AAAA") ? 1 : 28;
    p[o + 4] = 1; // IN
    queries[query_count++].length = o + 5;
  }
  fclose(f);
}

int main(int argc, char **argv) {
  if (argc != 7) {
    fprintf(stderr, "usage: udpblast IP PORT NAME-FILE SECONDS SOCKETS WINDOW\n");
    return 2;
  }
  double seconds = atof(argv[4]);
  int sockets = atoi(argv[5]), window = atoi(argv[6]);
  if (sockets > MAX_SOCKETS) sockets = MAX_SOCKETS;
  read_queries(argv[3]);
  if (!query_count) return 2;

  struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
  inet_pton(AF_INET, argv[1], &server.sin_addr);
  struct pollfd polled[MAX_SOCKETS];
  for (int i = 0; i < sockets; i++) {
    struct client *c = &clients[i];
    int big = 4 << 20;
    c->fd = socket(AF_INET, SOCK_DGRAM, 0);
    setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &big, sizeof big);
    if (connect(c->fd, (void *)&server, sizeof server)) fail("connect");
    c->sent_at = calloc(65536, sizeof *c->sent_at);
    c->next_id = i * 991; // so that sockets differ
    polled[i] = (struct pollfd){c->fd, POLLIN, 0};
  }

  static uint8_t in[BATCH][1500], out[BATCH][MAX_QUERY];
  static struct iovec in_iov[BATCH], out_iov[BATCH];
  static struct mmsghdr received[BATCH], sending[BATCH];
  for (int i = 0; i < BATCH; i++) {
    in_iov[i] = (struct iovec){in[i], sizeof in[i]};
    received[i].msg_hdr = (struct msghdr){.msg_iov = &in_iov[i], .msg_iovlen = 1};
    out_iov[i].iov_base = out[i];
    sending[i].msg_hdr = (struct msghdr){.msg_iov = &out_iov[i], .msg_iovlen = 1};
  }
  uint64_t sent = 0, completed = 0, good = 0;
  size_t next = 0;
  double start = now(), swept = start;
  for (;;) {
    double t = now();
    int open = t - start < seconds, worked = 0, waiting = 0;
    if (t - start >= seconds + patience) break;
    for (int i = 0; i < sockets; i++) {
      struct client *c = &clients[i];
      int n = c->waiting ? recvmmsg(c->fd, received, BATCH, MSG_DONTWAIT, NULL) : 0;
      for (int j = 0; j < n; j++) {
        uint16_t id = in[j][0] << 8 | in[j][1];
        if (received[j].msg_len < 12 || !c->sent_at[id]) continue;
        c->sent_at[id] = 0;
        c->waiting--;
        completed++;
        if (!(in[j][3] & 15) && in[j][7]) good++; // NOERROR with a record
      }
      if (n > 0) worked = 1;
      int batch = window - c->waiting, filled = 0;
      uint16_t ids[BATCH];
      if (!open) batch = 0;
      if (batch > BATCH) batch = BATCH;
      for (int tries = 0; filled < batch && tries < 4 * BATCH; tries++) {
        uint16_t id = c->next_id++;
        if (c->sent_at[id]) continue;
        struct query *q = &queries[next];
        if (++next == query_count) next = 0;
        memcpy(out[filled], q->octets, q->length);
        out[filled][0] = id >> 8;
        out[filled][1] = id;
        out_iov[filled].iov_len = q->length;
        c->sent_at[id] = (float)(t - start) + 1e-6f;
        ids[filled++] = id;
      }
      if (filled > 0) {
        int w = sendmmsg(c->fd, sending, filled, 0);
        if (w < 0) w = 0;
        for (int j = w; j < filled; j++) c->sent_at[ids[j]] = 0;
        c->waiting += w;
        sent += w;
        if (w) worked = 1;
      }
      waiting += c->waiting;
    }
    if (!open && !waiting) break;
    if (t - swept > patience / 4) {
      swept = t;
      for (int i = 0; i < sockets; i++)
        for (int id = 0; id < 65536; id++)
          if (clients[i].sent_at[id] && t - start - clients[i].sent_at[id] > patience) {
            clients[i].sent_at[id] = 0;
            clients[i].waiting--;
          }
    }
    if (!worked) poll(polled, sockets, 1);
  }
  double took = now() - start;
  if (took > seconds) took = seconds;
  printf("  Queries sent:         %lu\n", sent);
  printf("  Queries completed:    %lu (%.2f%%)\n", completed, 100.0 * completed / (sent ? sent : 1));
  printf("  Queries lost:         %lu (%.2f%%)\n", sent - completed, 100.0 * (sent - completed) / (sent ? sent : 1));
  printf("  Response codes:       NOERROR %lu (%.2f%%)\n", good, 100.0 * good / (completed ? completed : 1));
  printf("  Queries per second:   %.6f\n", completed / took);
}
