#!/usr/bin/env bash
# Installs on the first run, then serves. The flags are server.py's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'END'
usage: ./start-api-server.sh [flags]

Starts the Chatterbox server. The first run makes its own environment (Python 3.11 to 3.13 is all that it needs) and
fetches the weights; later runs start at once.

  --ultra-low-vram | --low-vram | --medium-vram | --high-vram    a preset for the GPU's memory
  --english | --multilingual                                     the model
  --host HOST   --port PORT                                      where to listen
  --help                                                         this, and every flag once installed

  CHATTERBOX_DEVICE=auto|cpu|cuda   which build of vLLM to install (auto: cuda where an NVIDIA GPU is present)
  CHATTERBOX_VENV=FOLDER            where to install it (default: .venv beside this script)
  CHATTERBOX_MODEL=demo             serve random weights, offline: it speaks noise
  PYTHON=PATH                       the Python to use

Nothing is installed yet: run it without --help to install and start, or run scripts/setup.sh to install only.
END
}

for flag in "$@"; do
  if [[ $flag == --help || $flag == -h ]] && ! "$here/scripts/setup.sh" --check -- "$@" >/dev/null 2>&1; then
    usage
    exit 0
  fi
done

python=$("$here/scripts/setup.sh" -- "$@")
export PATH="$(dirname "$python"):$PATH"  # vLLM's compilers call ninja and nvcc by name
exec "$python" "$here/server.py" "$@"
