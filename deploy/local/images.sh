#!/usr/bin/env bash
# Makes the images that compose.local.yaml names, where no registry can be reached: Debian by debootstrap, with
# etcd, Prometheus and an S3 server in it, and on top of it Emberline from a program that is built already.
#
# Usage: deploy/local/images.sh PATH_OF_EMBERLINE
# VERSION, REVISION, CREATED and SOURCE_DATE_EPOCH become build arguments; BUILD_OPTIONS goes to `docker build` as it is.
#
# Needs root (debootstrap does), docker with BuildKit, and mirrors of Debian and crates.io. What took long to make stays: the
# image of Debian in the engine, s3s-fs in $EMBERLINE_TOOLS (by default ~/.cache/emberline/tools).
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: deploy/local/images.sh PATH_OF_EMBERLINE" >&2; exit 2; }
[ -x "$1" ] || { echo "error: there is no program \`$1\`" >&2; exit 2; }
program=$(realpath "$1")
cd "$(dirname "$0")/../.."

S3S_FS=0.14.1
SUITE=trixie
tools=${EMBERLINE_TOOLS:-$HOME/.cache/emberline/tools}
# Another list of packages is another image.
packages=ca-certificates,etcd-client,etcd-server,prometheus,python3,tini
base=emberline-local/debian:$(printf '%s' "$SUITE $packages $S3S_FS" | sha256sum | cut -c1-12)
scratch=$(mktemp -d)
trap 'rm -rf --one-file-system "$scratch"' EXIT

if ! docker image inspect "$base" >/dev/null 2>&1; then
  for needed in debootstrap cargo; do
    command -v "$needed" >/dev/null || { echo "error: $needed is missing" >&2; exit 1; }
  done
  if ! "$tools/bin/s3s-fs" --version 2>/dev/null | grep -qF " $S3S_FS"; then
    cargo install s3s-fs --version "$S3S_FS" --features binary --locked --quiet --root "$tools"
  fi
  echo "making Debian $SUITE with ${packages//,/, }" >&2
  root=$scratch/debian
  debootstrap --variant=minbase --include="$packages" "$SUITE" "$root" >"$scratch/log" 2>&1 ||
    { tail -20 "$scratch/log" >&2; exit 1; }
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*
  install "$tools/bin/s3s-fs" "$root/usr/local/bin/"
  tar --sort=name -C "$root" -c . | docker import - "$base" >/dev/null
fi
docker tag "$base" emberline-local/debian:latest

# The program, and for one that is not static the libraries that it asks for.
mkdir -p "$scratch/context/prebuilt/usr/bin"
strip -o "$scratch/context/prebuilt/usr/bin/emberline" "$program"
{ ldd "$program" 2>/dev/null || true; } | grep -o '/[^ ]*' | while read -r library; do
  install -D "$library" "$scratch/context/prebuilt$library"
done
for target in emberline worker; do
  name=emberline
  [ "$target" = emberline ] || name=emberline-$target
  DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-1} docker build --quiet -f deploy/Dockerfile --target "$target" \
    --build-arg PREBUILT=prebuilt --build-arg RUST=emberline-local/debian:latest \
    --build-arg DEBIAN=emberline-local/debian:latest \
    --build-arg SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}" \
    --build-arg VERSION="${VERSION:-0.1.0}" --build-arg REVISION="${REVISION:-}" --build-arg CREATED="${CREATED:-}" \
    ${BUILD_OPTIONS:-} --tag "$name:local" "$scratch/context" >/dev/null
done
