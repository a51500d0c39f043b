"""Programs that tests run and that come with the packages of .venv, whether or not that is activated."""

import shutil
import sysconfig

SHELLCHECK = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or "shellcheck"
