# What a Debian or Ubuntu machine needs to build Emberline; sourced by `quickstart` and `ci.sh`.

# need COMMAND PACKAGE...: installs the packages if the command is missing, and says so.
need() {
  local command=$1
  shift
  if command -v "$command" >/dev/null; then
    return
  fi
  local sudo=
  if [ "$(id -u)" -ne 0 ]; then
    sudo=sudo
  fi
  if ! command -v apt-get >/dev/null; then
    echo "\`$command\` is missing, and this is no Debian or Ubuntu: install $* and start again" >&2
    exit 1
  fi
  echo "installing $* (for \`$command\`)" >&2
  $sudo apt-get update -qq >&2
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

prerequisites() {
  if ! command -v cargo >/dev/null; then
    echo "\`cargo\` is missing: install Rust 1.95 or newer, see https://rustup.rs" >&2
    exit 1
  fi
  # The embedded database and the cryptography are C: they take a compiler, nothing else.
  need cc gcc libc6-dev
}
