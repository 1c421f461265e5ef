# Sets `venv` to a virtual environment (the first argument, else target/python) that can import what is asked for; where
# that cannot be had it says SKIP and ends the script with status 0. Sourced, with `root` set:
#   want "IMPORTS" PIP_ARGUMENTS...
venv=${1:-$root/target/python}
want() {
    imports=$1
    shift
    if [ ! -x "$venv/bin/python" ]; then
        python3 -m venv "$venv" || { echo "SKIP: python3 with venv is not there"; exit 0; }
    fi
    if ! "$venv/bin/python" -c "import $imports" 2>/dev/null; then
        "$venv/bin/pip" install --quiet "$@" || { echo "SKIP: $imports cannot be had"; exit 0; }
    fi
}
