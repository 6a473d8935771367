#!/bin/sh
# bench/gpu.sh PART [--output FOLDER] [--dry-run]
#
# Measures one part of the GPU targets (1 to 11, or its name; "all" is every part in turn), each within SECONDS_PER_PART.
# Uses the Python named by PYTHON, else that of .venv if there is one, with the PyTorch it has; where it does not know
# Skipjack, installs this checkout for it. Takes nothing from the network.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
own=$root/.venv/bin/python
[ -x "$own" ] || own=python3
python=${PYTHON:-$own}
seconds=${SECONDS_PER_PART:-420}
part=${1:?usage: bench/gpu.sh PART [--output FOLDER] [--dry-run]}
shift
for option in "$@"; do
  [ "$option" = --dry-run ] && export TRITON_INTERPRET=1
done
if ! "$python" -c 'import skipjack.bench' 2>/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable "$root" || exit 2
fi
parts=$part
[ "$part" = all ] && parts='check steps drafts peers exact lossy large-peers rules rules-16 real rounds'
status=0
for name in $parts; do
  timeout --kill-after=15 "$seconds" "$python" -m skipjack.bench.gpu "$name" "$@"
  code=$?
  [ $code -eq 124 ] && echo "$name: not finished after $seconds s; the result file holds what it had found" >&2
  [ $code -ne 0 ] && status=$code
done
exit $status
