# The base of cell t211: Debian packages of a GPU host with its Python and compiler (stage.py), imported as they are.
FROM scratch
COPY --from=root / /
# Triton calls `/sbin/ldconfig -p`, which fails without /etc/ld.so.cache
RUN --network=none ["/usr/sbin/ldconfig"]
