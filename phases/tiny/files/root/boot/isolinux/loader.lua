-- The loader of the installer CD. It behaves as DragonFly's where a host can tell: a countdown that a key ends, a
-- prompt that takes `set console=comconsole` and `boot`, and a deaf ear for what was typed before the menu was up.
local syslinux = require "syslinux"

local ENTER, LINE_FEED, BACKSPACE, DELETE, ESCAPE = 13, 10, 8, 127, 27
local COUNTDOWN = 10 -- seconds
local FLUSH = 50 -- milliseconds without a key: nothing is pending any more
-- Emulated on a host that is busy, timer interrupts come late, and the kernel's check for them ends in a panic.
local KERNEL = "/boot/kernel initrd=/boot/initrd.gz root=cd0 loglevel=5 no_timer_check"
local CONSOLES = { comconsole = "console=ttyS0,115200", vidconsole = "console=tty0" }

local variables = { console = "vidconsole" }

local function boot(flags)
  print("Booting...")
  local console = CONSOLES[variables.console] or CONSOLES.vidconsole
  syslinux.run_command(KERNEL .. " " .. console .. " " .. flags)
  print("panic: the kernel could not be loaded")
end

local function read_line()
  local line = ""
  while true do
    local key = syslinux.get_key(0)
    if key == ENTER or key == LINE_FEED then
      print("")
      return line
    elseif key == BACKSPACE or key == DELETE then
      if #line > 0 then
        line = line:sub(1, -2)
        io.write("\b \b")
      end
    elseif key >= 32 and key < 127 then
      line = line .. string.char(key)
      io.write(string.char(key))
    end
  end
end

local function run(line)
  local name, value = line:match("^%s*set%s+(%w+)=(%S+)%s*$")
  local flags = line:match("^%s*boot(.*)$")
  if name then
    variables[name] = value
  elseif flags and flags:match("^%s*$") then
    boot("")
  elseif flags and flags:match("^%s+%-s%s*$") then
    boot("single")
  elseif line:match("%S") then
    print("unknown command: " .. line)
  end
end

local function prompt()
  while true do
    io.write("OK ")
    run(read_line())
  end
end

while syslinux.get_key(FLUSH) >= 0 do end
print("")
print("  1. Boot [Enter]")
print("  s. Boot single user")
print("  9. Escape to the loader prompt [ESC]")
print("")
for left = COUNTDOWN, 1, -1 do
  io.write("\rBooting in " .. left .. " seconds...  ")
  local key = syslinux.get_key(1000)
  if key == ENTER or key == LINE_FEED or key == string.byte("1") then
    break
  elseif key == string.byte("s") then
    print("")
    boot("single")
  elseif key == string.byte("9") or key == ESCAPE then
    print("")
    prompt()
  end
end
print("")
boot("")
prompt()
