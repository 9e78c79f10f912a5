# What a Debian or Ubuntu machine needs to build and test Emberline; sourced by `quickstart` and `ci.sh`.

# packages WHY NAME...: installs Debian packages, and says so.
packages() {
  local why=$1 sudo=
  shift
  if ! command -v apt-get >/dev/null; then
    echo "$why is missing, and this is no Debian or Ubuntu: install what they call $*, and start again" >&2
    exit 1
  fi
  if [ "$(id -u)" -ne 0 ]; then
    sudo=sudo
  fi
  echo "installing $* ($why is missing)" >&2
  $sudo apt-get update -qq >&2
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

# To build: the embedded database and the cryptography are C and take a compiler; etcd's client makes
# its types with protoc. Our own protos need none.
prerequisites() {
  if ! command -v cargo >/dev/null; then
    echo "\`cargo\` is missing: install Rust 1.95 or newer, see https://rustup.rs" >&2
    exit 1
  fi
  command -v cc >/dev/null || packages "a C compiler" gcc libc6-dev
  # The well-known types are a package of their own.
  echo 'import "google/protobuf/descriptor.proto";' |
    protoc -I/dev --descriptor_set_out=/dev/null /dev/stdin 2>/dev/null ||
    packages "protoc with the well-known types" protobuf-compiler libprotobuf-dev
}

# Prometheus and promtool, out of their package: installed, it would start a service on this machine.
prometheus_tools() {
  local tools=${EMBERLINE_TOOLS:-$HOME/.cache/emberline/tools} fresh
  if [ -x "$tools/bin/prometheus" ] && [ -x "$tools/bin/promtool" ]; then
    return
  fi
  if ! command -v apt-get >/dev/null; then
    echo "Prometheus is missing, and this is no Debian or Ubuntu: put \`prometheus\` and \`promtool\` into $tools/bin, and start again" >&2
    exit 1
  fi
  echo "unpacking prometheus into $tools/bin" >&2
  mkdir -p "$tools/bin"
  fresh=$(mktemp -d "$tools/prometheus.XXXXXX")
  (
    cd "$fresh"
    # Where no list of packages is there yet, `packages` fetches it.
    apt-cache show prometheus >/dev/null 2>&1 || packages "the list of packages" ca-certificates
    apt-get -o APT::Sandbox::User=root download -qq prometheus >&2
    dpkg-deb -x prometheus_*.deb .
    mv usr/bin/prometheus usr/bin/promtool "$tools/bin/"
  )
  rm -rf "$fresh"
}

# To test, too: Python for an independent client, and for the example that trains with scikit-learn;
# a real etcd with its own command line, and certificates for it; a real Prometheus.
test_prerequisites() {
  prerequisites
  python3 -c 'import ensurepip, venv' 2>/dev/null || packages "Python with venv" python3 python3-venv
  command -v etcd >/dev/null || packages "etcd" etcd-server
  command -v etcdctl >/dev/null || packages "etcdctl" etcd-client
  prometheus_tools
  command -v openssl >/dev/null || packages "openssl" openssl
}
