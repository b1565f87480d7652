// The guest's first process, see in_bochs.py: runs the program with its output
// on the serial line, says how it ended, and turns the machine off.
#include <fcntl.h>
#include <stdio.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(int argc, char** argv) {
  mount("proc", "/proc", "proc", 0, NULL);
  mount("dev", "/dev", "devtmpfs", 0, NULL);
  const int line = open("/dev/ttyS0", O_RDWR);
  struct termios raw;
  tcgetattr(line, &raw);
  cfmakeraw(&raw);
  tcsetattr(line, TCSANOW, &raw);
  for (int i = 0; i < 3; ++i) {
    dup2(line, i);
  }
  const pid_t child = fork();
  if (child == 0) {
    execv(argv[1], argv + 1);
    perror(argv[1]);
    _exit(127);
  }
  int end = 0;
  waitpid(child, &end, 0);
  const int signal = WIFSIGNALED(end) ? WTERMSIG(end) : 0;
  dprintf(line, "\nstatus %d\n", signal ? 128 + signal : WEXITSTATUS(end));
  tcdrain(line);
  // Bochs ends when its port 0x8900 is sent this word.
  iopl(3);
  for (const char* c = "Shutdown"; *c; ++c) {
    outb(*c, 0x8900);
  }
  pause();
}
