#!/usr/bin/env bash
# A model in service, a good new version that is promoted, and a bad one that is caught and taken back by
# itself, all under a stream of requests of which none may fail. About 30 seconds.
#
# Usage: canary.sh [STATE_DIRECTORY]
# Without a directory it is a temporary one, which is removed. The binary is `emberline` in the PATH, or
# what EMBERLINE names; beside it this needs python3. Leaves with 0 only if all of it went as described.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
emberline=${EMBERLINE:-emberline}
command -v "$emberline" >/dev/null || { echo "error: there is no program \`$emberline\`: name it with EMBERLINE" >&2; exit 2; }
# The cluster is the one in the state directory, and no other.
unset EMBERLINE_SERVER EMBERLINE_STATE_DIR

temporary=
if [ $# -gt 0 ]; then
  state=$1
  mkdir -p "$state"
else
  temporary=$(mktemp -d "${TMPDIR:-/tmp}/emberline-canary.XXXXXX")
  state=$temporary/state
  mkdir "$state"
fi
[ ! -e "$state/state.redb" ] || { echo "error: \`$state\` has a state already: name a directory that is empty" >&2; exit 2; }

dev= stream= step=
stop() { # pid: ends a process that was started here, and waits for it
  kill "$1" 2>/dev/null || true
  wait "$1" || return $?
}
finish() {
  trap '' INT TERM
  for process in "$step" "$stream" "$dev"; do
    [ -z "$process" ] || stop "$process" >/dev/null 2>&1 || true
  done
  [ -z "$temporary" ] || rm -rf "$temporary"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
  echo "error: $*" >&2
  exit 1
}
ember() { # not in the foreground, so that a signal ends this at once
  local code=0
  "$emberline" --state-dir "$state" "$@" &
  step=$!
  wait "$step" || code=$?
  step=
  return $code
}
field() { # expression in Python about the value `it`, read as JSON
  python3 -c 'import json, sys; it = json.load(sys.stdin); print(eval(sys.argv[1]))' "$1"
}
say() { printf '\n== %s\n' "$*"; }

say "a cluster with a serving worker"
"$emberline" --state-dir "$state" dev --listen 127.0.0.1:0 >"$state/dev.log" 2>&1 &
dev=$!
until grep -q '^models are served on' "$state/dev.log"; do
  kill -0 "$dev" 2>/dev/null || fail "it has ended: $(cat "$state/dev.log")"
  sleep 0.05
done
cat "$state/dev.log"

say "the first version is live at once"
ember run "$here/pipeline.yaml"
ember deployments watch d1
address=$(ember environments -o json | field 'it[0]["replicas"][0]["address"]')

say "requests begin, made of the real rows; what was true is told 2 s later"
python3 "$here/stream.py" "$address" "$here/data/ai4i2020.csv" --labels >"$state/stream.log" 2>&1 &
stream=$!

say "a good new version, by a canary: promoted"
ember run "$here/canary.yaml"
ember deployments watch d2 || fail "the good version was not promoted"

say "a bad one, trained on shuffled labels, which a lowered gate lets through: taken back"
ember run "$here/canary.yaml" --param labels=shuffled --param least_f1=0
! ember deployments watch d3 || fail "the bad version was not caught"

sleep 1 # of requests for the version that stayed
say "what the stream saw"
code=0
stop "$stream" || code=$?
stream=
cat "$state/stream.log"
[ "$code" = 0 ] || fail "requests failed"

say "what became of it"
ember deployments list
echo
ember deployments show d3
echo
ember dora

of() { ember deployments show "$1" -o json | field "$2"; }
live=$(ember environments -o json | field 'it[0]["deployment"], it[0]["version"]')
[ "$live" = "('d2', 2)" ] || fail "live is $live"
[ "$(of d2 'it["outcome"], it["failure"]')" = "('live', None)" ] || fail "the good version is not live and well"
[ "$(of d3 'it["outcome"], it["failure"]["cause"]')" = "('aborted', 'canary_aborted')" ] || fail "the bad version is not aborted"
counted=$(ember dora -o json | field 'it["places"][0]["change_fail_rate"]["part"], it["places"][0]["change_fail_rate"]["whole"]')
[ "$counted" = "(1, 3)" ] || fail "DORA counts $counted failed deployments"
say "all as it should be: version 2 is live, version 3 was taken back, no request failed"
