#!/bin/sh
# Run a command as the owner of /results, to which it writes, never as root.
set -eu
if [ "$(id -u)" = 0 ]; then
  uid=$(stat -c %u /results)
  gid=$(stat -c %g /results)
  if [ "$uid" = 0 ]; then # Docker or root made the folder
    uid=$(id -u bn)
    gid=$(id -g bn)
    chmod 1777 /results
  fi
  exec setpriv --reuid="$uid" --regid="$gid" --clear-groups --no-new-privs -- "$@"
fi
exec "$@"
