#!/bin/sh
# Counts the lines of the input and hands the number on as a result.
set -eu
lines=$(cat "$EMBERLINE_INPUT_LINES"/* | wc -l)
echo "counted $lines lines"
printf '{"lines": %d}\n' "$lines" > "$EMBERLINE_RESULTS"
