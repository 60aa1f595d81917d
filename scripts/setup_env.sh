#!/usr/bin/env bash
# Create the environment: .venv at the root of the repository, with requirements.txt installed.
#
#   source scripts/setup_env.sh    # create it, put it first on PATH and export PYTHON, its interpreter
#   bash scripts/setup_env.sh      # only create it
#
# PYTHON=/path/to/python chooses the interpreter to create it with (3.11 or 3.12); the default is the first of
# python3.11, python3.12 and python3 that works. A stamp in .venv records what is installed, so a second call takes
# well under a second.

_qlora_fits() {  # a launcher with the right name may still fail, so run it
    "$1" -c 'import sys, ensurepip, venv
sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}

_qlora_minor() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

_qlora_setup_env() {
    local root venv base candidate stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    venv=$root/.venv

    # An earlier call exported PYTHON as .venv's own interpreter; that is not a request for another one.
    base=${PYTHON:-}
    case $base in "$venv"/* | .venv/* | ./.venv/*) base= ;; esac
    if [ -n "$base" ] && ! _qlora_fits "$base"; then
        echo "error: PYTHON=$base is not a working Python 3.11 or 3.12 with the venv module" >&2
        return 1
    fi

    if ! _qlora_fits "$venv/bin/python" ||
        { [ -n "$base" ] && [ "$(_qlora_minor "$base")" != "$(_qlora_minor "$venv/bin/python")" ]; }; then
        for candidate in python3.11 python3.12 python3; do
            [ -z "$base" ] && _qlora_fits "$candidate" && base=$candidate
        done
        if [ -z "$base" ]; then
            echo "error: no Python 3.11 or 3.12 with the venv module found;" \
                "install one, or set PYTHON=/path/to/python" >&2
            return 1
        fi
        echo "Creating $venv with Python $(_qlora_minor "$base")"
        "$base" -m venv --clear "$venv" || return 1
    fi

    stamp=$("$venv/bin/python" -c 'import hashlib, sys
print(sys.version.split()[0], hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$root/requirements.txt") || return 1
    if [ "$(cat "$venv/requirements.stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "Installing requirements.txt (2 GB with a CPU torch, several more with CUDA; minutes)"
        _qlora_install "$venv" "$root" || {
            echo "pip failed; retrying once" >&2
            sleep 5
            _qlora_install "$venv" "$root"
        } || {
            echo "error: pip could not install requirements.txt into $venv; see its message above" >&2
            return 1
        }
        printf '%s\n' "$stamp" >"$venv/requirements.stamp" || return 1
    fi

    export VIRTUAL_ENV=$venv PYTHON=$venv/bin/python
    case $PATH in "$venv/bin":*) ;; *) export PATH=$venv/bin:$PATH ;; esac
}

_qlora_install() {
    local -a quiet=(--quiet)
    [ -t 1 ] && quiet=()  # in a terminal show progress bars
    "$1/bin/python" -m pip install "${quiet[@]+"${quiet[@]}"}" --disable-pip-version-check \
        -r "$2/requirements.txt" || return 1
    command -v nvidia-smi >/dev/null || return 0
    # kernels for norms and rotary embedding; needs triton, which comes with torch for CUDA
    "$1/bin/python" -m pip install "${quiet[@]+"${quiet[@]}"}" --disable-pip-version-check "liger-kernel>=0.8.3,<0.9"
}

if ! _qlora_setup_env; then
    # shellcheck disable=SC2317  # `exit` is reached when the file is run rather than sourced
    return 1 2>/dev/null || exit 1
fi
