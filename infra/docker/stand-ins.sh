#!/usr/bin/env bash
# Make stand-ins for the base images, under the tags that the files name, where no registry can be reached:
#   infra/docker/stand-ins.sh python valkey prometheus wheels       (or some of them; the others are made of the first)
#   python      Debian's Python 3.11
#   valkey      Debian's Redis 7.0, called as Valkey is
#   prometheus  Debian's Prometheus 2.42
#   wheels      fills infra/docker/wheels by this machine's pip, so that the build of our image asks no index either
# Images come from Debian's packages, by debootstrap and apt-get: that needs root, and an engine (DOCKER_HOST); it takes a
# minute or two. Those that are there stay. Grafana is in no package of Debian's, so it has none.
set -euo pipefail
cd "$(dirname "$0")"

tag() { grep -ohE "$1:[A-Za-z0-9._-]+" Dockerfile ../../docker-compose.yml | head -1; }

make_wheels() {
  local python=${PYTHON:-python3} requirements
  requirements=$("$python" -c '
import tomllib
project = tomllib.load(open("../../pyproject.toml", "rb"))
# Debian has Python 3.11.2, for which redis-py needs one package more than for later ones.
print(*project["project"]["dependencies"], *project["build-system"]["requires"], "async-timeout", sep="\n")')
  mkdir -p wheels
  "$python" -m pip download --quiet --dest wheels --constraint ../../constraints.txt --python-version 3.11 \
    --only-binary :all: --requirement /dev/stdin <<< "$requirements"
}

# image TAG DIRECTORY: made of the Python stand-in and of what is in a directory, with its Dockerfile.
image() { docker build --quiet --tag "$1" "$2"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python=$(tag python) valkey=$(tag valkey/valkey) prometheus=$(tag prom/prometheus)
export DOCKER_BUILDKIT=0

is_there() { docker image inspect "$1" > /dev/null 2>&1; }

make_python() {
  is_there "$python" && return
  # What is lost in a power failure is made again: no fsync for each file.
  DPKG_FORCE=unsafe-io debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/python" > "$work/log" 2>&1 \
    || { tail -20 "$work/log" >&2; exit 1; }
  (
    cd "$work/python"
    rm -rf var/cache/apt/* var/lib/apt/lists/* usr/share/doc usr/share/man usr/share/locale var/log/*
    ln -s /usr/bin/python3 usr/local/bin/python3
    ln -s /usr/bin/python3 usr/local/bin/python
  )
  tar -C "$work/python" -c . | docker import --change 'CMD ["python3"]' - "$python"
}

# unpack DIRECTORY PACKAGE...
unpack() {
  local directory=$1 package
  mkdir -p "$directory/root" "$work/packages"
  (cd "$work/packages" && apt-get download -qq "${@:2}" 2> /dev/null)
  for package in "${@:2}"; do dpkg-deb --extract "$work/packages/$package"_*.deb "$directory/root"; done
}

make_valkey() {
  is_there "$valkey" && return
  unpack "$work/valkey" redis-tools libjemalloc2 liblzf1 libatomic1
  ln -s redis-check-rdb "$work/valkey/root/usr/bin/valkey-server"
  ln -s redis-cli "$work/valkey/root/usr/bin/valkey-cli"
  # As the real one does: as root, the data is made the server's user's, who then runs it.
  cat > "$work/valkey/root/usr/bin/docker-entrypoint.sh" <<'END'
#!/bin/sh
set -e
if [ "${1#-}" != "$1" ]; then set -- valkey-server "$@"; fi
if [ "$1" = valkey-server ] && [ "$(id -u)" = 0 ]; then
  chown -R valkey .
  exec setpriv --reuid=valkey --regid=valkey --clear-groups "$0" "$@"
fi
umask 0077
exec "$@"
END
  chmod +x "$work/valkey/root/usr/bin/docker-entrypoint.sh"
  cat > "$work/valkey/Dockerfile" <<END
FROM $python
COPY root /
RUN groupadd -r -g 999 valkey && useradd -r -g valkey -u 999 valkey && install -d -o valkey -g valkey /data && ldconfig
VOLUME /data
WORKDIR /data
ENTRYPOINT ["docker-entrypoint.sh"]
EXPOSE 6379
CMD ["valkey-server"]
END
  image "$valkey" "$work/valkey"
}

make_prometheus() {
  is_there "$prometheus" && return
  unpack "$work/prometheus" prometheus busybox
  cat > "$work/prometheus/Dockerfile" <<END
FROM $python
COPY root/usr/bin/prometheus /bin/prometheus
COPY root/usr/bin/promtool root/bin/busybox /bin/
RUN ln -s busybox /bin/wget && install -d -o nobody -g nogroup /etc/prometheus /prometheus
USER nobody
EXPOSE 9090
VOLUME /prometheus
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
END
  image "$prometheus" "$work/prometheus"
}

[ $# -gt 0 ] || { echo "stand-ins.sh: say what to make: python, valkey, prometheus, wheels" >&2; exit 2; }
for what; do
  case $what in
    python | valkey | prometheus | wheels) ;;
    *) echo "stand-ins.sh: there is no stand-in for $what; there are python, valkey, prometheus, and wheels" >&2; exit 2 ;;
  esac
done
for what; do "make_$what"; done
