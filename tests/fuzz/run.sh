#!/usr/bin/env bash
# Feeds the readers of tests/fuzz with what libFuzzer makes of the kept corpus.
#
# Usage: tests/fuzz/run.sh [RUNS [TARGET...]]
#
# Each target gets RUNS inputs (5000), each with 10 s and 1 GiB at most. What does harm is kept in
# tests/fuzz/found/TARGET, and it is told how to feed it again. With KEEP=1, inputs that reach something new are
# added to the corpus, and what became needless is taken out.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:-5000}
shift || true
[ $# -gt 0 ] || set -- $(cd tests/fuzz/corpus && ls)

# With the features that the whole workspace has, so that nobody else's crates are built once more.
binary=${EMBERLINE_FUZZ_BINARY:-}
if [ -z "$binary" ]; then
  RUSTC_WORKSPACE_WRAPPER=$PWD/tests/fuzz/rustc.sh \
    cargo build --locked --quiet --workspace --features emberline-fuzz/fuzz --bin emberline-fuzz
  binary=${CARGO_TARGET_DIR:-target}/debug/emberline-fuzz
fi
limits="-timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=512"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

failed=0
for target in "$@"; do
  corpus=tests/fuzz/corpus/$target
  found=tests/fuzz/found/$target
  mkdir -p "$found" "$scratch/$target"
  most=4096
  case $target in bundle) most=20000 ;; esac
  dictionary=
  [ ! -f "tests/fuzz/$target.dict" ] || dictionary="-dict=tests/fuzz/$target.dict"
  log=$scratch/$target.log
  if EMBERLINE_FUZZ_TARGET=$target "$binary" $limits $dictionary -max_len=$most -runs="$runs" -seed=1 \
    -artifact_prefix="$found/" -print_final_stats=1 "$scratch/$target" "$corpus" >"$log" 2>&1; then
    awk -v target="$target" '
      /INITED|DONE|NEW|pulse|REDUCE/ { for (i = 1; i <= NF; i++) if ($i == "cov:") cov = $(i + 1) }
      /number_of_executed_units/ { runs = $2 } /average_exec_per_sec/ { rate = $2 } /peak_rss_mb/ { rss = $2 }
      END { printf "%-12s %7d inputs, %6d edges, %5d/s, %4d MiB\n", target, runs, cov, rate, rss }' "$log"
    rmdir --ignore-fail-on-non-empty "$found"
  else
    failed=1
    echo "$target: does harm" >&2
    grep -E "panicked at|ERROR:|SUMMARY:|Test unit written" -A 2 "$log" | head -n 20 >&2 || tail -n 20 "$log" >&2
    for input in "$found"/*; do
      echo "again: EMBERLINE_FUZZ_TARGET=$target $binary $limits $input" >&2
    done
  fi
  if [ -n "${KEEP:-}" ]; then
    mkdir -p "$scratch/$target.merged"
    EMBERLINE_FUZZ_TARGET=$target "$binary" $limits -max_len=$most \
      -use_counters=0 -set_cover_merge=1 \
      "$scratch/$target.merged" "$corpus" "$scratch/$target" >>"$log" 2>&1 || tail -n 5 "$log" >&2
    kept=$(find "$corpus" -name 'found-*' -o -name 'seed-*')
    for old in "$corpus"/*; do
      case $kept in *"$old"*) ;; *) rm "$old" ;; esac
    done
    cp "$scratch/$target.merged"/* "$corpus/" 2>/dev/null || true
  fi
done
rmdir --ignore-fail-on-non-empty tests/fuzz/found 2>/dev/null || true
exit $failed
