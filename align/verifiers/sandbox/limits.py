"""The limits that a process in a sandbox sets for itself, for good: resources, files, system calls, and packages.

The text of this file precedes ``confined.py`` in a sandbox, and imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` costs milliseconds in every program
    from importlib.machinery import ModuleSpec
    from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
PR_CAPBSET_DROP = 24
CLONE_NEWUSER = 0x10000000

# ---- system calls that no program may use ----

DENIED = """
# A program has no network, and no way to other processes.
socket 41 198, socketpair 53 199, connect 42 203, bind 49 200
# Memory and descriptors of other processes, and signals to them.
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272
process_madvise 440 440, process_mrelease 448 448, pidfd_open 434 434, pidfd_getfd 438 438
pidfd_send_signal 424 424, kill 62 129, tkill 200 130, tgkill 234 131
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240
# New processes and programs. `clone` is restricted below, because threads need it.
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281
# Memory that its limit does not count.
memfd_create 319 279, memfd_secret 447 447
# Memory, queues and semaphores of System V, which all processes of a user share.
shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197
msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187
semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192
# Queues of POSIX, which outlive the process.
mq_open 240 180, mq_unlink 241 181, mq_timedsend 242 182, mq_timedreceive 243 183, mq_notify 244 184
mq_getsetattr 245 185
# Other users: for root, the limit of threads holds for another user only.
setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143, setresuid 117 147, setresgid 119 149
setgroups 116 159, setfsuid 122 151, setfsgid 123 152
# Parts of the kernel with a large attack surface, which a program hardly needs.
io_uring_setup 425 425, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282
keyctl 250 219, add_key 248 217, request_key 249 218
# Mounts, namespaces, and files by handles instead of paths.
mount 165 40, umount2 166 39, fsopen 430 430, open_tree 428 428, move_mount 429 429
unshare 272 97, setns 308 268, chroot 161 51, pivot_root 155 41, open_by_handle_at 304 265
# Priorities and processors, also of other processes.
setpriority 141 140, ioprio_set 251 30, sched_setaffinity 203 122, sched_setscheduler 144 119
sched_setattr 314 274, migrate_pages 256 238, move_pages 279 239
# Landlock leaves modes, owners, times and attributes of files to their owner.
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54
utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, truncate 76 45, file_setattr 469 469
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, setxattrat 463 463
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, removexattrat 466 466
"""
"""Each system call with its number on x86_64 and on aarch64; ``-`` if there is no such call."""
CLONE = (56, 220)
CLONE3 = (435, 435)
PRCTL = (157, 167)
PRLIMIT = (302, 261)
FCNTL = (72, 25)
F_SETOWN = 8
F_SETOWN_EX = 15
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD = 0x10000
ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
EPERM = 0x00050001
ENOSYS = 0x00050026

# An instruction of a filter is (operation, instructions to skip if true, to skip if false, operand).
Instruction = tuple[int, int, int, int]
LOAD, JEQ, JGE, JSET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
CALL, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24
"""Offsets in the kernel's ``seccomp_data``, which LOAD reads."""


def confine(task: dict[str, Any]) -> None:
    """Apply all limits of a task to this process. They hold until it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    # A user of a namespace or of a switch has no other threads.
    is_separate = task["level"] == "bubblewrap"
    if task["user"] is not None:
        change_user(task["user"], is_complete=is_separate)
        is_separate = os.getresuid()[0] == task["user"]
    elif task["level"] == "landlock" and libc.unshare(CLONE_NEWUSER) == 0:
        is_separate = True
        drop_capabilities(libc)  # which the namespace gave
    if task["level"] != "command":
        # The parent may die first, and a program that sleeps would stay.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    set_limits(task, 0 if is_separate else count_threads(os.getresuid()[0]))
    if task["level"] == "unsafe":
        return
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("no_new_privs")
    if os.geteuid() == 0:
        drop_capabilities(libc)
    if task["level"] == "landlock":
        restrict_files(libc, task["readable"], task["writable"])
    filter_system_calls(libc, is_required=task["level"] != "command")


def change_user(user: int, is_complete: bool) -> None:
    """Switch from root to another user, for whom the limit of threads holds.

    Behind Landlock only the real user changes, which the limit depends on: root must still be able to read a Python
    below ``/root``. A container may lack the other user; then the limit counts root's own threads.
    """
    try:
        os.setgroups([])
        os.setresgid(user, user if is_complete else 0, user if is_complete else 0)
        os.setresuid(user, user if is_complete else 0, user if is_complete else 0)
    except OSError:
        if is_complete:
            raise


def count_threads(user: int) -> int:
    """Return the number of threads of a user's processes."""
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # the process has ended
            continue
    return count


def set_limits(task: dict[str, Any], others: int) -> None:
    """Set the resource limits: processor time, memory, sizes of files, number of descriptors and of threads.

    ``others`` is the number of the user's other threads, because the kernel counts all threads of a user.
    """
    limits = {
        "RLIMIT_AS": task["memory"],
        "RLIMIT_FSIZE": task["file_size"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": others + task["threads"],
        "RLIMIT_STACK": 8 << 20,
        "RLIMIT_MSGQUEUE": 0,
    }
    if task["level"] in ("command", "unsafe"):
        del limits["RLIMIT_NPROC"]
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (limit, limit))
    # A second later the kernel kills a program that ignores the signal.
    resource.setrlimit(resource.RLIMIT_CPU, (task["cpu"], task["cpu"] + 1))


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up all capabilities of root."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = struct.pack("Ii", 0x20080522, 0)
    if libc.capset(header, bytes(24)):
        raise OSError("capset")


def restrict_files(libc: ctypes.CDLL, readable: list[str], writable: list[str]) -> None:
    """Allow the process to read files below ``readable``, to write ``writable``, and no other access, by Landlock."""
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        raise OSError("Landlock")
    files = (1 << 13) - 1 | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0) | (1 << 15 if abi >= 5 else 0)
    network = 3 if abi >= 4 else 0
    scopes = 3 if abi >= 6 else 0
    attributes = struct.pack("QQQ", files, network, scopes)
    size = 8 if abi < 4 else (16 if abi < 6 else 24)
    ruleset = libc.syscall(444, attributes, ctypes.c_size_t(size), 0)
    for path in readable:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        # Read a file; in folders also list them. To open a file for writing may truncate it.
        access = 4 | (8 if os.path.isdir(path) else 0) | ((2 | 1 << 14) & files if path in writable else 0)
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", access, descriptor), 0)
        os.close(descriptor)
    if libc.syscall(446, ruleset, 0):
        raise OSError("Landlock")
    os.close(ruleset)


def denied_calls(column: int) -> list[int]:
    """Return the numbers of the denied calls on a kind of processor, a column of ``DENIED``."""
    lines = [line for line in DENIED.splitlines() if line and not line.startswith("#")]
    numbers = [call.split()[1 + column] for line in lines for call in line.split(", ")]
    return [int(number) for number in numbers if number != "-"]


def deny_by_argument(number: int, argument: int, tests: list[Instruction]) -> list[Instruction]:
    """Return instructions that deny a call if tests of one argument lead to the instruction behind them."""
    denial = [(LOAD, 0, 0, argument), *tests, (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
    return [(JEQ, 0, len(denial), number), *denial]


def filter_system_calls(libc: ctypes.CDLL, is_required: bool) -> None:
    """Forbid new processes, programs, sockets, signals, tracing, and system calls around namespaces, by seccomp."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        if is_required:
            raise OSError(f"no filter of system calls for {machine}")
        return
    column = list(AUDIT_ARCH).index(machine)
    # x86_64 has every call a second time, for x32, with this bit in its number.
    code = [(LOAD, 0, 0, ARCHITECTURE), (JEQ, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL_PROCESS)]
    code += [(LOAD, 0, 0, CALL), (JGE, 0, 1, 0x40000000), (RETURN, 0, 0, KILL_PROCESS)]
    for number in denied_calls(column):
        code += [(JEQ, 0, 1, number), (RETURN, 0, 0, EPERM)]
    # glibc falls back to clone, whose flags can be read: threads are allowed, processes are not.
    code += [(JEQ, 0, 1, CLONE3[column]), (RETURN, 0, 0, ENOSYS)]
    code += deny_by_argument(CLONE[column], FIRST_ARGUMENT, [(JSET, 1, 0, CLONE_THREAD)])
    # Death with the parent cannot be switched off. ``prlimit`` may only name process 0, the process itself.
    code += deny_by_argument(PRCTL[column], FIRST_ARGUMENT, [(JEQ, 0, 1, PR_SET_PDEATHSIG)])
    code += deny_by_argument(PRLIMIT[column], FIRST_ARGUMENT, [(JEQ, 1, 0, 0)])
    # Nor may it own a descriptor that sends signals to another process.
    code += deny_by_argument(FCNTL[column], SECOND_ARGUMENT, [(JEQ, 1, 0, F_SETOWN), (JEQ, 0, 1, F_SETOWN_EX)])
    code += [(RETURN, 0, 0, ALLOW)]
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(program)
    filter_program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    if libc.prctl(22, 2, filter_program, 0, 0) and is_required:
        raise OSError("seccomp")


class PackageFinder:
    """Finds packages by their folders, because all other packages stay hidden."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = places

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of a package, or None for any other name."""
        from importlib.util import spec_from_file_location

        place = self._places.get(name, "")
        if place.endswith(".py") or not place:
            return spec_from_file_location(name, place) if place else None
        return spec_from_file_location(name, f"{place}/__init__.py", submodule_search_locations=[place])
