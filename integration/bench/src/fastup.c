// fastup: a deliberately cheap authoritative server, the upstream of the benchmark. It shares its core with the load, so
// what it does not use is left to press the server under test: about 2.4 us of CPU for an answer over DoT, where NSD
// takes 15.
//
// One thread, epoll; UDP with recvmmsg and sendmmsg, TCP, and TLS by OpenSSL over memory BIOs. Every name under
// bench.perfzone.net has an A and an AAAA record whose address is made from the name (so an answer that belongs to
// another question is noticed), other types are NODATA, every other name is NXDOMAIN. Each response is a TLS record of its
// own, as from an ordinary server; records that are ready together leave in one write.
//
//   fastup IP PORT TLS-PORT CERT KEY COUNTER-FILE
//
// COUNTER-FILE holds two native uint64 that others may read at any time: responses sent, TLS handshakes finished. They
// prove that hits are hits, that misses are misses, and that connections are kept.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
  BATCH = 64,        // datagrams of one recvmmsg
  MAX_QUERY = 900,   // longer ones are junk here
  MAX_ANSWER = 1024, // a query and the largest record set below
  TTL = 3600,        // longer than any run
  HEADER = 12,
};
static const char zone[] = "\5bench\10perfzone\3net"; // its length with the root label is sizeof zone

static uint64_t *count; // responses, handshakes
static SSL_CTX *tls;
static int poller;

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static size_t put16(uint8_t *p, unsigned v) {
  p[0] = v >> 8;
  p[1] = v;
  return 2;
}
static size_t put32(uint8_t *p, uint32_t v) {
  put16(p, v >> 16);
  put16(p + 2, v);
  return 4;
}

// put_record writes owner (a compression pointer's offset), type, class IN, TTL and the length of the data.
static size_t put_record(uint8_t *p, unsigned owner, unsigned type, unsigned length) {
  put16(p, 0xc000 | owner);
  put16(p + 2, type);
  put16(p + 4, 1);
  put32(p + 6, TTL);
  put16(p + 10, length);
  return 12;
}

// respond writes the response to query q of n octets to r; it returns its length, or 0 for junk.
static size_t respond(const uint8_t *q, size_t n, uint8_t *r) {
  if (n < HEADER + 5 || n > MAX_QUERY || (q[2] & 0x80)) return 0;
  size_t i = HEADER, zone_at = 0;
  uint32_t hash = 2166136261u; // FNV-1a over the name's labels, letters in lower case
  while (i < n && q[i]) {
    if (q[i] > 63) return 0;
    if (!zone_at && i + sizeof zone <= n && !strncasecmp((const char *)q + i, zone, sizeof zone)) zone_at = i;
    for (size_t k = 0; k <= q[i] && i + k < n; k++) hash = (hash ^ (q[i + k] | 0x20)) * 16777619u;
    i += q[i] + 1;
  }
  size_t end = i + 5; // of the question: the root label, type, class
  if (end > n) return 0;
  unsigned type = q[i + 1] << 8 | q[i + 2];
  int edns = q[10] == 0 && q[11] == 1 && n >= end + 11 && q[end] == 0 && q[end + 1] == 0 && q[end + 2] == 41;

  memcpy(r, q, end);
  r[2] = 0x84 | (q[2] & 0x79); // QR, AA; opcode and RD as they were
  r[3] = 0;
  put16(r + 4, 1);
  put16(r + 6, 0);
  put16(r + 8, 0);
  put16(r + 10, edns);
  size_t o = end;
  if (zone_at && type == 1) {
    put16(r + 6, 1);
    o += put_record(r + o, HEADER, 1, 4);
    o += put32(r + o, 0xc6120000u | (hash & 0xffff)); // 198.18.x.x, RFC 2544's
  } else if (zone_at && type == 28) {
    put16(r + 6, 1);
    o += put_record(r + o, HEADER, 28, 16);
    o += put32(r + o, 0x20010db8);
    o += put32(r + o, 0);
    o += put32(r + o, 0);
    o += put32(r + o, hash);
  } else { // NODATA with the zone's SOA record, NXDOMAIN with the root's
    static const uint8_t root[] = {0, 0, 6, 0, 1, 0, 0, TTL >> 8, TTL & 255, 0, 22, 0, 0};
    put16(r + 8, 1);
    if (zone_at) {
      o += put_record(r + o, zone_at, 6, 24);
      o += put16(r + o, 0xc000 | zone_at);
      o += put16(r + o, 0xc000 | zone_at);
    } else {
      r[3] = 3;
      memcpy(r + o, root, sizeof root);
      o += sizeof root;
    }
    o += put32(r + o, 1);      // serial
    o += put32(r + o, 3600);   // refresh
    o += put32(r + o, 900);    // retry
    o += put32(r + o, 604800); // expire
    o += put32(r + o, 3600);   // minimum
  }
  if (edns) {
    static const uint8_t opt[] = {0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0}; // 1232 octets, no options
    memcpy(r + o, opt, sizeof opt);
    o += sizeof opt;
  }
  return o;
}

enum kind { UDP, LISTEN_TCP, LISTEN_TLS, CONNECTION };

struct socket {
  enum kind kind;
  int fd, dead, want_out;
  SSL *ssl; // NULL on plain connections
  BIO *from_net, *to_net;
  uint8_t *in; // octets not yet read as messages, IN_ROOM of them at most
  size_t in_len;
  uint8_t *out; // octets not yet written: out_off to out_len
  size_t out_len, out_off, out_room;
};
enum { IN_ROOM = 65536 + 2 };

static void drop(struct socket *s) {
  SSL_free(s->ssl);
  close(s->fd);
  free(s->in);
  free(s->out);
  free(s);
}

static void queue(struct socket *s, const void *p, size_t n) {
  if (s->out_off == s->out_len) s->out_off = s->out_len = 0;
  if (s->out_len + n > s->out_room) {
    s->out_room = (s->out_len + n) * 2;
    s->out = realloc(s->out, s->out_room);
    if (!s->out) fail("realloc");
  }
  memcpy(s->out + s->out_len, p, n);
  s->out_len += n;
}

static void flush_out(struct socket *s) {
  if (s->ssl) {
    char *p;
    long n = BIO_get_mem_data(s->to_net, &p);
    if (n > 0) {
      queue(s, p, n);
      (void)BIO_reset(s->to_net);
    }
  }
  while (s->out_off < s->out_len) {
    ssize_t n = write(s->fd, s->out + s->out_off, s->out_len - s->out_off);
    if (n < 0 && errno == EAGAIN) break;
    if (n < 0) {
      s->dead = 1;
      return;
    }
    s->out_off += n;
  }
  int want = s->out_off < s->out_len;
  if (want != s->want_out) {
    struct epoll_event e = {.events = EPOLLIN | (want ? EPOLLOUT : 0), .data.ptr = s};
    epoll_ctl(poller, EPOLL_CTL_MOD, s->fd, &e);
    s->want_out = want;
  }
}

// serve answers the whole messages in s->in.
static void serve(struct socket *s) {
  uint8_t r[2 + MAX_ANSWER];
  size_t at = 0;
  while (s->in_len - at >= 2) {
    size_t l = s->in[at] << 8 | s->in[at + 1];
    if (s->in_len - at < 2 + l) break;
    size_t n = respond(s->in + at + 2, l, r + 2);
    at += 2 + l;
    if (!n) {
      s->dead = 1;
      return;
    }
    count[0]++;
    put16(r, n);
    if (!s->ssl) {
      queue(s, r, n + 2);
    } else if (SSL_write(s->ssl, r, n + 2) <= 0) {
      s->dead = 1;
      return;
    }
  }
  memmove(s->in, s->in + at, s->in_len - at);
  s->in_len -= at;
}

static void tls_failed(struct socket *s, int ret) {
  if (SSL_get_error(s->ssl, ret) == SSL_ERROR_WANT_READ) return;
  s->dead = 1;
  ERR_clear_error();
}

static void readable(struct socket *s) {
  static uint8_t b[65536];
  ssize_t n = read(s->fd, b, s->ssl ? sizeof b : IN_ROOM - s->in_len);
  if (n < 0 && errno == EAGAIN) return;
  if (n <= 0) {
    s->dead = 1;
    return;
  }
  if (!s->ssl) {
    memcpy(s->in + s->in_len, b, n);
    s->in_len += n;
    serve(s);
    return;
  }
  BIO_write(s->from_net, b, n);
  if (!SSL_is_init_finished(s->ssl)) {
    int ret = SSL_do_handshake(s->ssl);
    if (ret <= 0) {
      tls_failed(s, ret);
      return;
    }
    count[1]++;
  }
  while (!s->dead) {
    int ret = SSL_read(s->ssl, s->in + s->in_len, IN_ROOM - s->in_len);
    if (ret <= 0) {
      tls_failed(s, ret);
      return;
    }
    s->in_len += ret;
    serve(s);
  }
}

static void watch(struct socket *s) {
  struct epoll_event e = {.events = EPOLLIN, .data.ptr = s};
  if (epoll_ctl(poller, EPOLL_CTL_ADD, s->fd, &e)) fail("epoll_ctl");
}

static void open_socket(enum kind kind, const char *ip, int port) {
  struct socket *s = calloc(1, sizeof *s);
  int one = 1, big = 4 << 20;
  s->kind = kind;
  s->fd = socket(AF_INET, (kind == UDP ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK, 0);
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
  inet_pton(AF_INET, ip, &a.sin_addr);
  if (kind == UDP) {
    setsockopt(s->fd, SOL_SOCKET, SO_RCVBUF, &big, sizeof big);
    setsockopt(s->fd, SOL_SOCKET, SO_SNDBUF, &big, sizeof big);
  } else {
    setsockopt(s->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  }
  if (bind(s->fd, (void *)&a, sizeof a) || (kind != UDP && listen(s->fd, 4096))) fail("bind");
  watch(s);
}

static void accept_one(struct socket *listener) {
  int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK), one = 1;
  if (fd < 0) return;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  struct socket *s = calloc(1, sizeof *s);
  s->kind = CONNECTION;
  s->fd = fd;
  s->in = malloc(IN_ROOM);
  if (listener->kind == LISTEN_TLS) {
    s->ssl = SSL_new(tls);
    s->from_net = BIO_new(BIO_s_mem());
    s->to_net = BIO_new(BIO_s_mem());
    SSL_set_bio(s->ssl, s->from_net, s->to_net); // which owns them from here
    SSL_set_accept_state(s->ssl);
  }
  watch(s);
}

static void serve_udp(struct socket *s) {
  static uint8_t in[BATCH][1500], out[BATCH][MAX_ANSWER];
  static struct sockaddr_in from[BATCH];
  static struct iovec in_iov[BATCH], out_iov[BATCH];
  static struct mmsghdr received[BATCH], sent[BATCH];
  for (int i = 0; i < BATCH; i++) {
    in_iov[i] = (struct iovec){in[i], sizeof in[i]};
    received[i].msg_hdr =
        (struct msghdr){.msg_name = &from[i], .msg_namelen = sizeof from[i], .msg_iov = &in_iov[i], .msg_iovlen = 1};
  }
  int n = recvmmsg(s->fd, received, BATCH, 0, NULL), m = 0;
  for (int i = 0; i < n; i++) {
    size_t l = respond(in[i], received[i].msg_len, out[m]);
    if (!l) continue;
    out_iov[m] = (struct iovec){out[m], l};
    sent[m].msg_hdr =
        (struct msghdr){.msg_name = &from[i], .msg_namelen = sizeof from[i], .msg_iov = &out_iov[m], .msg_iovlen = 1};
    m++;
  }
  count[0] += m;
  for (int i = 0, k; i < m; i += k) {
    k = sendmmsg(s->fd, sent + i, m - i, 0);
    if (k <= 0) break;
  }
}

int main(int argc, char **argv) {
  if (argc != 7) {
    fprintf(stderr, "usage: fastup IP PORT TLS-PORT CERT KEY COUNTER-FILE\n");
    return 2;
  }
  signal(SIGPIPE, SIG_IGN);
  tls = SSL_CTX_new(TLS_server_method());
  SSL_CTX_set_min_proto_version(tls, TLS1_2_VERSION);
  SSL_CTX_set_mode(tls, SSL_MODE_RELEASE_BUFFERS);
  if (SSL_CTX_use_certificate_chain_file(tls, argv[4]) != 1 ||
      SSL_CTX_use_PrivateKey_file(tls, argv[5], SSL_FILETYPE_PEM) != 1) {
    ERR_print_errors_fp(stderr);
    return 1;
  }
  int fd = open(argv[6], O_RDWR | O_CREAT | O_TRUNC, 0644);
  if (fd < 0 || ftruncate(fd, 2 * sizeof *count)) fail(argv[6]);
  count = mmap(NULL, 2 * sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (count == MAP_FAILED) fail("mmap");
  poller = epoll_create1(0);
  open_socket(UDP, argv[1], atoi(argv[2]));
  open_socket(LISTEN_TCP, argv[1], atoi(argv[2]));
  open_socket(LISTEN_TLS, argv[1], atoi(argv[3]));
  for (;;) {
    struct epoll_event events[256];
    int n = epoll_wait(poller, events, 256, -1);
    for (int i = 0; i < n; i++) {
      struct socket *s = events[i].data.ptr;
      switch (s->kind) {
      case UDP: serve_udp(s); break;
      case LISTEN_TCP:
      case LISTEN_TLS: accept_one(s); break;
      case CONNECTION:
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(s);
        if (!s->dead || s->ssl) flush_out(s); // a TLS alert still has to leave
        if (s->dead) drop(s);
      }
    }
  }
}
