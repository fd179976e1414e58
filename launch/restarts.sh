# shellcheck shell=bash
# Sourced by the launchers: which exit statuses are worth another start.

# again STATUS: whether to start again. 0 is done; 1 and 2 need somebody to mend something; 126 and 127 are a command
# that is not there; 130 is Ctrl-C. Whatever else happened, the last checkpoint is where the next start goes on.
again() {
  case $1 in
    0 | 1 | 2 | 126 | 127 | 130) return 1 ;;
    *) return 0 ;;
  esac
}

# worst STATUS ...: what a group of processes ended with: what needs mending before what does not, 0 last.
worst() {
  local status found=0
  for status in "$@"; do
    if [[ $status -ne 0 && ($found -eq 0 || $status -lt $found) ]]; then
      found=$status
    fi
  done
  echo "$found"
}
