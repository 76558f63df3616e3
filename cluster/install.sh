#!/bin/bash
# Installs what pyproject.toml names, in the versions of constraints.txt, both beside this folder:
#   bash cluster/install.sh [cpu | cuda | URL of a package index for torch]
# Without a word: the CPU build of torch where there is no GPU, else that of PyPI, which is for CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=${1:-$(nvidia-smi > /dev/null 2>&1 && echo cuda || echo cpu)}
case "$build" in
  cpu) index=https://download.pytorch.org/whl/cpu ;;
  cuda) index= ;;
  *) index=$build ;;
esac

python -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")
' > /tmp/tagi-requirements.txt

# Torch first: what builds against it has to find the one that is meant. An index of torch builds has
# not every version of what torch needs, so those come from PyPI in the next line.
python -m pip install -q ${index:+--no-deps --index-url "$index"} "$(grep '^torch==' constraints.txt)"
python -m pip install -q -c constraints.txt -r /tmp/tagi-requirements.txt
