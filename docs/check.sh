#!/usr/bin/env bash
# Checks that the documents are true:
#   (a) docs/guide/pipeline-reference.md and docs/pipeline.schema.json are what the binary prints;
#   (b) every command of README.md, docs/guide/*.md and examples/*/README.md runs;
#   (c) relative links between the repository's Markdown files point to files that exist.
#
# Usage: docs/check.sh PATH_OF_EMBERLINE [MARKDOWN_FILE...]
# With files, only the commands of these are run.
#
# A fenced block with the info string `sh` is run with bash, in the order of its file, in a scratch
# directory of that file's own with a copy of examples/. An HTML comment on a line before the block
# says more:
#   <!-- exit: 1 -->          the exit code that is expected instead of 0
#   <!-- file: my.yaml -->    this block is not run: its text is written to that file
#   <!-- deadline: 300 -->    seconds that the block may take instead of 120
#   <!-- needs: sklearn -->    the block is left out where python3 has no such module
# Blocks with any other info string (`console`, `text`, `yaml`, …) are not run.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: docs/check.sh PATH_OF_EMBERLINE [MARKDOWN_FILE...]" >&2; exit 2; }
[ -x "$1" ] || { echo "error: there is no program \`$1\`" >&2; exit 2; }
exec python3 "$(dirname "${BASH_SOURCE[0]}")/check.py" "$@"
