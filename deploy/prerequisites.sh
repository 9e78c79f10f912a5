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

# To test, too: Python for an independent client, and for the example that trains with scikit-learn;
# a real etcd, and certificates for it.
test_prerequisites() {
  prerequisites
  python3 -c 'import ensurepip, venv' 2>/dev/null || packages "Python with venv" python3 python3-venv
  command -v etcd >/dev/null || packages "etcd" etcd-server
  command -v openssl >/dev/null || packages "openssl" openssl
}
