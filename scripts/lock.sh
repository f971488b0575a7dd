#!/usr/bin/env bash
# Remakes requirements/*.txt from pyproject.toml. Pins that still fit are kept; `scripts/lock.sh --upgrade` takes the
# newest of everything. The overrides and exclusions that make a resolution possible are in pyproject.toml, [tool.uv].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset UV_FIND_LINKS  # a folder of local wheels would put its own versions into the lists
uv=$(dirname "$(scripts/setup.sh)")/uv
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() { "$uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header "$@" >/dev/null; }
# Every line would carry the one platform the lists are for.
plain() {
  sed -E -e "s/ and (platform_machine == 'x86_64'|sys_platform == 'linux')//g" \
    -e "s/(platform_machine == 'x86_64'|sys_platform == 'linux') and //g" \
    -e "s/ ; (platform_machine == 'x86_64'|sys_platform == 'linux')$//" "$1"
}
everything=(pyproject.toml --extra ultra-low-vram --extra multilingual --group upstream)

cp requirements/{cpu,cuda,test}.txt "$work"
compile "${everything[@]}" --extra cuda -o "$work/cuda.txt" "$@"
plain "$work/cuda.txt" >requirements/cuda.txt

# What torch from PyPI needs beyond its CPU build; on a CPU it does without Triton.
grep '^torch==' requirements/cuda.txt >"$work/torch.in"
compile "$work/torch.in" --constraints requirements/cuda.txt -o "$work/torch.txt"
plain "$work/torch.txt" | sed 's/ *;.*//' >"$work/needs.txt"
grep -E '^(cuda|nvidia)\b' "$work/needs.txt" >requirements/cuda-runtime.txt
grep '^triton==' "$work/needs.txt" >requirements/triton.txt

# The CPU list: the same torch without those, under the name that PyTorch's own index gives it.
sed 's/==.*//' requirements/{cuda-runtime,triton}.txt >"$work/excludes.txt"
sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' "$work/cpu.txt"
compile "${everything[@]}" --extra cpu --group cpu-list --excludes "$work/excludes.txt" -o "$work/cpu.txt" "$@"
plain "$work/cpu.txt" | sed 's/^\(torch==[0-9.]*\)/\1+cpu/' >requirements/cpu.txt

# The test tools: what `dev` adds to either list.
compile pyproject.toml --extra dev --constraints requirements/cuda.txt -o "$work/test.txt" "$@"
plain "$work/test.txt" | grep -vEf <(sed -E 's/^([^=]+==).*/^\1/' requirements/cpu.txt requirements/cuda.txt | sort -u) \
  >requirements/test.txt
wc -l requirements/*.txt
