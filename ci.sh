#!/usr/bin/env bash
# Installs what the tests need, and passes every check and test. The tools stay in
# $EMBERLINE_TOOLS (by default ~/.cache/emberline/tools), so that the next time is short.
set -euo pipefail
cd "$(dirname "$0")"
. deploy/prerequisites.sh

NEXTEST=0.9.151
DENY=0.20.2
S3S_FS=0.14.1
export EMBERLINE_TOOLS=${EMBERLINE_TOOLS:-$HOME/.cache/emberline/tools}
export PATH=$EMBERLINE_TOOLS/bin:$PATH
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
target=${CARGO_TARGET_DIR:-target}

summary=()
current=
trap '[ $? -eq 0 ] || echo "== $current: FAILED" >&2' EXIT

# Not `"$@" || …`: behind that, bash would go on after an error within a function.
step() {
  local start=$SECONDS
  current=$1
  shift
  echo "== $current"
  "$@"
  summary+=("$(printf '%5d s  %s' $((SECONDS - start)) "$current")")
}

tool() { # name, version: from crates.io, once
  if ! "cargo-$1" --version 2>/dev/null | grep -qF " $2"; then
    cargo install "cargo-$1" --version "$2" --locked --quiet --root "$EMBERLINE_TOOLS" \
      --target-dir "$target/tools"
  fi
}

install() {
  test_prerequisites
  cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
  cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
  tool nextest "$NEXTEST"
  tool deny "$DENY"
  # The S3 server of the tests: it keeps its objects as plain files, and checks signatures.
  if ! s3s-fs --version 2>/dev/null | grep -qF " $S3S_FS"; then
    cargo install s3s-fs --version "$S3S_FS" --features binary --locked --quiet \
      --root "$EMBERLINE_TOOLS" --target-dir "$target/tools"
  fi
  tests/python/setup.sh >/dev/null
  tests/containers/setup.sh
}

deny() {
  cargo deny --locked --all-features check bans licenses sources
  # The list of advisories is fetched; a machine without a way to it is told, and goes on.
  if cargo deny fetch db 2>/dev/null; then
    cargo deny --locked --all-features check advisories
  else
    echo "NOT CHECKED: advisories, for the list of them cannot be fetched from here"
  fi
}

lints() {
  cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
  # Few machines can run the GPU backend; all can see that it compiles.
  cargo clippy --locked -p emberline-train -p emberline-cli --features gpu --quiet -- -D warnings
}

tests() {
  # The process tests run the binary that a user runs.
  cargo build --locked -p emberline-cli
  # Five times the seeds that a plain `cargo test` plays.
  EMBERLINE_SIM_SEEDS=10000 cargo nextest run --locked --workspace --no-fail-fast
  cargo test --locked --workspace --doc --quiet
}

step "tools" install
step "format" cargo fmt --all --check
step "licences and dependencies" deny
step "lints" lints
step "tests" tests
step "chart" tests/helm/check.sh "$target/debug/emberline"
step "fuzz" tests/fuzz/run.sh
step "documents" env "PATH=$EMBERLINE_TOOLS/python/bin:$PATH" docs/check.sh "$target/debug/emberline"

printf '\nall passed\n'
printf '%s\n' "${summary[@]}"
