# shellcheck shell=bash
# Sourced by the scripts of this folder: makes sure that programs are there, by Debian's packages where they can be had.
#
# need PROGRAM=PACKAGE ...     returns 1 and says what is missing if something still is; never asks, never fails the caller.
# newer_qemu MAJOR            the same for QEMU of at least this major version, from the backports of this Debian release.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair#*=}")
    done
    [ "${#missing[@]}" -eq 0 ] && return 0
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" -eq 0 ]; then
        say "installing ${missing[*]}"
        [ -n "${APT_UPDATED:-}" ] || apt-get update -qq >/dev/null 2>&1 || say "cannot refresh the list of packages"
        APT_UPDATED=1
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
            say "apt-get could not install ${missing[*]}"
    fi
    missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair%%=*} (package ${pair#*=})")
    done
    [ "${#missing[@]}" -eq 0 ] && return 0
    say "not on this machine: ${missing[*]}"
    return 1
}

qemu_major() {
    qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p'
}

newer_qemu() {
    local wanted=$1 have suite list
    have=$(qemu_major)
    [ "${have:-0}" -ge "$wanted" ] && return 0
    suite=$(. /etc/os-release 2>/dev/null && [ "${ID:-}" = debian ] && printf '%s-backports' "${VERSION_CODENAME:-}")
    if [ "${suite:--backports}" != -backports ] && command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" -eq 0 ]; then
        if ! grep -rqs "^[^#]*$suite" /etc/apt/sources.list /etc/apt/sources.list.d; then
            list=/etc/apt/sources.list.d/$suite.list
            say "adding $list"
            echo "deb http://deb.debian.org/debian $suite main" >"$list" || return 1
        fi
        say "installing QEMU of $suite"
        apt-get update -qq >/dev/null 2>&1 || say "cannot refresh the list of packages"
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends -t "$suite" \
            qemu-system-x86 seabios >/dev/null 2>&1 || say "apt-get could not install qemu-system-x86 of $suite"
        hash -r
    fi
    have=$(qemu_major)
    [ "${have:-0}" -ge "$wanted" ] && return 0
    say "QEMU $wanted is not to be had here; there is ${have:-none}"
    return 1
}
