/* What a process says when a file that it has mapped is not there any more: truncated by another
   program, or on a disk that failed. The kernel sends SIGBUS, at whatever instruction looks at it. */
#if defined(_WIN32)

__declspec(dllexport) int say_truncated(void) { return -1; }

#else

#define _XOPEN_SOURCE 700
#include <signal.h>
#include <string.h>
#include <unistd.h>

static const char sentence[] =
    "error: a file that was being read became shorter, or its disk failed; run again when nothing "
    "else writes to it (LORAFORMAT_IO=pread names the file)\n";

/* Only functions that POSIX calls async-signal-safe. */
static void on_bus_error(int signal_number, siginfo_t *info, void *context) {
    (void)context;
    if (info->si_code == BUS_ADRERR) {
        ssize_t ignored = write(STDERR_FILENO, sentence, sizeof sentence - 1);
        (void)ignored;
        _exit(3);
    }
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

__attribute__((visibility("default"))) int say_truncated(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, 0);
}

#endif
