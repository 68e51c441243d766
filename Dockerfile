# The images are arguments so that a local base works where no registry can be reached:
#   docker build --build-arg GO_IMAGE=localhost/go -t dnsgateway .
ARG GO_IMAGE=golang:1.26-bookworm
FROM ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY gateway gateway
ARG VERSION=
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.buildVersion=${VERSION}" \
      -o /out/usr/local/bin/dnsgateway ./cmd/dnsgateway \
 && mkdir -p /out/app/log /out/app/cache /out/etc/ssl/certs \
 && cp /etc/ssl/certs/ca-certificates.crt /out/etc/ssl/certs/ \
 && printf 'nonroot:x:65532:65532::/app:/\n' > /out/etc/passwd \
 && chown -R 65532:65532 /out/app

# No shell and nothing else: one static binary, the CA roots, and directories for the log and the cache.
FROM scratch
COPY --from=build /out/ /
WORKDIR /app
USER 65532:65532
VOLUME ["/app/log", "/app/cache"]
# Ports above 1023 need no privilege. 8853: DoT and DoQ; 8443: DoH; both serve only when a configuration asks for them.
EXPOSE 8053/udp 8053/tcp 8853/tcp 8853/udp 8443/tcp 8443/udp
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/usr/local/bin/dnsgateway", "health"]
ENTRYPOINT ["/usr/local/bin/dnsgateway"]
CMD ["run"]
