"""Runs an x86-64 Linux program, statically linked, on a processor that Bochs emulates.

Bochs emulates a whole machine, AVX-512 included, so the program runs under a Linux of its
own: the output comes back when it has ended, with its exit status. Debian's packages:
`apt-get install bochs bochs-term isolinux xorriso`, and for the kernel, which needs no
installation, `apt-get download linux-image-6.1.0-NN-cloud-amd64` (the number: `apt-cache
depends linux-image-cloud-amd64`) and `dpkg -x linux-image-*.deb DIR`: DIR/boot/vmlinuz-*.
Bochs 2.7, Debian 12's, rounds ties up in conversions to float16; Debian 13's 3.0 does not.

    python tests/cpu_kernels/in_bochs.py --kernel DIR/boot/vmlinuz-* ./program

With `--root FOLDER` the program is one of that folder's files, named by its path there, and
has the others beside it, such as its libraries, or Python and a package.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

INIT = Path(__file__).with_name("in_bochs_init.c")
ISOLINUX = [
    Path("/usr/lib/ISOLINUX/isolinux.bin"),
    Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"),
]

# Without ACPI and APIC there is less to set up. Linux doubts the size that Bochs gives for
# XSAVEC's compact format, and would go without AVX. A panic ends the emulation.
MENU = """default linux
label linux
kernel /linux
append initrd=/initrd console=ttyS0 loglevel=1 acpi=off noapic nolapic nosmp \
clearcpuid=xsavec,xsaves mitigations=off cryptomgr.notests panic=-1 reboot=t -- {arguments}
"""

# `ips`, instructions in an emulated second, is low: delays then take few instructions.
MACHINE = """display_library: term
cpu: model={cpu}, ips=10000000, reset_on_triple_fault=0
clock: sync=none
memory: guest={memory}, host={memory}
romimage: file=$BXSHARE/BIOS-bochs-latest
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=output
plugin_ctrl: speaker=0, gameport=0, parallel=0
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
log: log
panic: action=fatal
"""


def archive(files):
    """An initial file system in cpio's format `newc`, of (name, mode, content)."""
    packed = bytearray()
    for name, mode, content in [*files, ("TRAILER!!!", 0, b"")]:
        fields = [0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        packed += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (name.encode() + b"\0", content):
            packed += part
            packed += bytes(-len(packed) % 4)
    return bytes(packed)


def files_in(root):
    """What a folder holds, for an archive."""
    for path in sorted(root.rglob("*")):
        content = b""
        if path.is_symlink():
            content = os.readlink(path).encode()
        elif path.is_file():
            content = path.read_bytes()
        yield str(path.relative_to(root)), path.lstat().st_mode, content


def make_disc(folder, kernel, files, command):
    """boot.iso: the kernel, and the guest's files with what starts the command."""
    disc = folder / "disc"
    disc.mkdir()
    init = folder / "init"
    subprocess.run(["cc", "-O1", "-static", str(INIT), "-o", str(init)], check=True)
    start = [("proc", 0o40755, b""), ("dev", 0o40755, b""), ("init", 0o100755, init.read_bytes())]
    (disc / "initrd").write_bytes(archive([*files, *start]))
    (disc / "linux").write_bytes(kernel.read_bytes())
    quoted = " ".join(f'"{word}"' for word in command)
    (disc / "isolinux.cfg").write_text(MENU.format(arguments=quoted))
    for file in ISOLINUX:
        (disc / file.name).write_bytes(file.read_bytes())
    boot = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot"]
    boot += ["-boot-load-size", "4", "-boot-info-table"]
    make = ["xorriso", "-as", "mkisofs", "-quiet", *boot, "-o", "boot.iso", "disc"]
    subprocess.run(make, cwd=folder, check=True, stderr=subprocess.DEVNULL)


def run(kernel, files, command, cpu, memory, timeout):
    """What the command printed, and its exit status, or None if it came to no end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_disc(folder, kernel, files, command)
        (folder / "machine").write_text(MACHINE.format(cpu=cpu, memory=memory))
        # Debian's Bochs has its debugger built in, which waits for a word.
        (folder / "commands").write_text("continue\nquit\n")
        # `script` gives the terminal that Bochs' text display asks for.
        emulator = ["script", "-qec", "bochs -q -f machine -rc commands", "screen"]
        subprocess.run(
            ["timeout", str(timeout), *emulator],
            cwd=folder,
            env={**os.environ, "TERM": "vt100"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        output = folder / "output"
        text = output.read_text(errors="replace") if output.exists() else ""
        ended = re.search(r"\nstatus (\d+)\n\Z", text)
        if ended:
            return text[: ended.start()], int(ended[1])
        screen = (folder / "screen").read_text(errors="replace")
        return f"{text}\n{screen[-2000:]}", None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kernel = os.environ.get("MLX_DEFORM_LINUX_KERNEL")
    parser.add_argument(
        "--kernel", type=Path, default=kernel, help="vmlinuz, default: $MLX_DEFORM_LINUX_KERNEL"
    )
    parser.add_argument("--cpu", default="corei7_skylake_x", help="see `bochs --help cpu`")
    parser.add_argument("--timeout", type=int, default=900, help="seconds")
    parser.add_argument("--root", type=Path, help="folder of the guest's files")
    parser.add_argument("--memory", type=int, default=512, help="of the guest, in MiB")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.kernel is None:
        parser.error("no kernel: give --kernel or MLX_DEFORM_LINUX_KERNEL")
    on_host = args.root / args.program.lstrip("/") if args.root else Path(args.program)
    for path in (args.kernel, on_host):
        if not path.is_file():
            parser.error(f"no such file: {path}")
    if args.root:
        files, program = files_in(args.root), f"/{args.program.lstrip('/')}"
    else:
        files, program = [("program", 0o100755, on_host.read_bytes())], "/program"
    command = [program, *args.arguments]
    text, status = run(args.kernel, files, command, args.cpu, args.memory, args.timeout)
    print(text, end="")
    if status is None:
        sys.exit("in_bochs: the program came to no end")
    sys.exit(status)


if __name__ == "__main__":
    main()
