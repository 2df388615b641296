"""Starts a command that sees nothing but what it is given. Run as a script with python -I; imports nothing of ours.

    python -I sandbox.py SPEC COMMAND...        SPEC is JSON: {"binds": [[from, to]], "root": empty folder, "tmp_mb": N}
    python -I sandbox.py --try SPEC             exit code 0 where the system allows it

The command runs in user, mount, process, network and interprocess namespaces of its own, as a user without rights, in a
root that holds the bound paths, read-only, a private /tmp, and /proc and /dev of its own. It cannot see, signal or
outlive anything else. (Linux; see namespaces(7), user_namespaces(7), pid_namespaces(7).)
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import tempfile

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
FLAGS = (  # a mount's as statvfs(3) tells them, and as mount(2) wants them
    (os.ST_NOSUID, 2), (os.ST_NODEV, 4), (os.ST_NOEXEC, 8), (os.ST_NOATIME, 1 << 10), (os.ST_NODIRATIME, 1 << 11),
    (os.ST_RELATIME, 1 << 21),
)  # fmt: skip
DIE_WITH_PARENT, NO_NEW_RIGHTS = 1, 38  # prctl
DEVICES = ("null", "zero", "full", "random", "urandom")
INSIDE_USER = 1000
REFUSED = 97  # exit code where the system has no such namespaces


class Refused(OSError):
    """The system does not allow a step."""


def call(name, *arguments):
    """A function of the C library; raises Refused when it fails."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise Refused(error, f"{name}: {os.strerror(error)}")


def mount(source, target, kind=None, flags=0, options=None):
    text = [t.encode() if t is not None else None for t in (source, target, kind, options)]
    call("mount", text[0], text[1], text[2], ctypes.c_ulong(flags), text[3])


def separate():
    """Leave the namespaces of the parent."""
    user, group = os.getuid(), os.getgid()
    call("unshare", NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE_USER} {user} 1"),
        ("gid_map", f"{INSIDE_USER} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    mount(None, "/", None, RECURSIVE | PRIVATE)


def locked(path):
    """Flags of the mount that holds a path, which a user without rights may add to but not take away."""
    found = os.statvfs(path).f_flag
    return sum(to for of, to in FLAGS if found & of)


def mounts_below(path):
    """Where mounts lie at or below a path, the path itself first."""
    with open("/proc/self/mountinfo") as file:
        places = [line.split()[4].encode().decode("unicode_escape") for line in file]
    return [path, *(place for place in places if place.startswith(path + "/"))]


def build_root(root, binds, tmp_mb):
    """A new root in memory: bound paths read-only, devices, and places to write that are private and bounded."""
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEVICES, "size=16m,mode=755")
    for place in ("/tmp", "/dev/shm"):  # first: an installation may lie below /tmp
        os.makedirs(root + place, exist_ok=True)
        mount("tmpfs", root + place, "tmpfs", NO_SUID | NO_DEVICES, f"size={tmp_mb}m,mode=1777")
    for source, target in binds:
        goal = root + target
        if os.path.islink(source) and source == target:
            os.makedirs(os.path.dirname(goal), exist_ok=True)
            os.symlink(os.readlink(source), goal)
            continue
        if os.path.isdir(source):
            os.makedirs(goal, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(goal), exist_ok=True)
            open(goal, "w").close()
        mount(source, goal, None, BIND | RECURSIVE)
        for place in mounts_below(os.path.realpath(goal)):
            mount(None, place, None, BIND | REMOUNT | READ_ONLY | NO_SUID | locked(place))
    accelerators = [n for n in os.listdir("/dev") if n.startswith(("nvidia", "dri", "kfd"))]
    for name in (*DEVICES, *accelerators):
        if os.path.isdir(f"/dev/{name}"):
            os.makedirs(f"{root}/dev/{name}")
        else:
            open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, BIND | RECURSIVE)
    os.makedirs(root + "/proc")
    mount(None, root, None, BIND | REMOUNT | READ_ONLY | NO_SUID)


def leave_like(status):
    """End this process as the child ended."""
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) not in (9, 19) else None
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 255)


def enter(root):
    """The new root, without a way back."""
    with contextlib.suppress(Refused):  # then an empty /proc: some systems forbid a second one
        mount("proc", root + "/proc", "proc", NO_SUID | NO_DEVICES | READ_ONLY)
    os.chdir(root)
    os.chroot(root)
    os.chdir("/tmp")


def run(spec, command):
    parent = os.getppid()
    call("prctl", DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    separate()
    build_root(spec["root"], spec["binds"], spec["tmp_mb"])
    first = os.fork()  # the first process of the new namespace: it reaps, and all ends with it
    if first:
        leave_like(os.waitpid(first, 0)[1])
    call("prctl", DIE_WITH_PARENT, signal.SIGKILL)
    enter(spec["root"])
    worker = os.fork()
    if not worker:
        call("prctl", NO_NEW_RIGHTS, 1, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.execv(command[0], command)
    for fd in spec.get("fds", ()):
        os.close(fd)
    while True:
        pid, status = os.wait()
        if pid == worker:
            # A process that is first in its namespace cannot be killed from inside it: tell by exit code.
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def main():
    if sys.argv[1:2] == ["--try"]:
        with tempfile.TemporaryDirectory() as root:
            child = os.fork()
            if not child:
                try:
                    separate()
                    build_root(root, json.loads(sys.argv[2])["binds"], 1)
                except (OSError, AttributeError) as error:
                    print(error)
                    os._exit(REFUSED)
                os._exit(0)
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    run(json.loads(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    main()
