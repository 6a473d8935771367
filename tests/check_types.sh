#!/usr/bin/env sh
# Pyright, strict, on the built wheel: type checkers cannot follow the package mapping in the checkout.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$BIN/python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$BIN/python" -m pip install --quiet --no-deps --target "$work/site" "$work"/dist/*.whl
# Triton's language, numba's and LLVM's builder are Python in their syntax alone: files of kernels are left to compilers.
kernels=$(cd "$work" && grep -rlE --include='*.py' '@triton.jit|@kernel|@intrinsic|^from llvmlite' site/skipjack | sed 's/.*/"&"/' | paste -sd, -)
cat >"$work/pyrightconfig.json" <<CONFIG
{"include": ["site/skipjack"], "ignore": [$kernels], "typeCheckingMode": "strict", "pythonVersion": "3.10",
 "reportMissingTypeStubs": "none", "reportUnknownMemberType": "none", "reportPrivateUsage": "none"}
CONFIG
cd "$work"
"$BIN/pyright" --pythonpath "$BIN/python" -p pyrightconfig.json
