#!/bin/sh
# The compiler of the workspace's own crates while fuzzing, as RUSTC_WORKSPACE_WRAPPER: it adds what
# libFuzzer looks at to tell what an input has reached. Everybody else's crates are as they are.
for argument in "$@"; do
  case $argument in
    build_script_build | proc-macro | -vV | --print*) exec "$@" ;;
  esac
done
exec "$@" \
  -Ccodegen-units=1 \
  -Cpasses=sancov-module \
  -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
  -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares
