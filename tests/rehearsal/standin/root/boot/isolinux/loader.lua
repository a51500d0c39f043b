-- A stand-in for DragonFly's boot loader, of the CD and of the installed disk: menu, countdown, prompt, loader.conf.
-- It throws away what was typed before the menu was up. Files named by `manner` give it the vices of bad lines.
local syslinux = require "syslinux"

local ENTER, LINE_FEED, BACKSPACE, DELETE, ESCAPE, SPACE = 13, 10, 8, 127, 27, 32
local FLUSH = 50 -- milliseconds without a key: nothing is pending any more
local CONSOLES = { comconsole = "console=ttyS0,115200", vidconsole = "console=tty0" }
local KNOWN = {
  ["autoboot_delay"] = true, ["boot_serial"] = true, ["comconsole_speed"] = true, ["console"] = true,
  ["dm_load"] = true, ["hw.vtnet.csum_disable"] = true, ["kernel_options"] = true,
  ["loader_color"] = true, ["vfs.root.mountfrom"] = true, ["virtio_load"] = true, ["virtio_pci_load"] = true,
}

local function read_file(path)
  local file = io.open(path, "r")
  if not file then return nil end
  local text = file:read("*a")
  file:close()
  return text
end

-- The CD's files are below /boot; the disk's first partition, which is /boot later, has them at its top.
local top = read_file("/.standin/disk") and "" or "/boot"
local on_disk = top == ""
local manner = {}
for word in (read_file(top .. "/manner") or ""):gmatch("%S+") do
  local name, value = word:match("^(%w+)=(%d+)$")
  manner[name or word] = tonumber(value) or true
end

local variables = {}
local written, typed = 0, 0

-- Sends each n-th character twice, as a firmware does that mirrors the screen to the line.
local function write(text)
  if not manner.double then
    io.write(text)
    return
  end
  for character in text:gmatch(".") do
    written = written + 1
    io.write(character)
    if written % manner.double == 0 and character:match("%w") then io.write(character) end
  end
end

local function say(line) write(line) io.write("\n") end

-- Loses each n-th key, the first `deaf` ones, or takes its time over each.
local function key(wait)
  local got = syslinux.get_key(wait)
  if got >= 0 then
    typed = typed + 1
    if manner.slow then syslinux.msleep(manner.slow) end
    if manner.lose and typed % manner.lose == 0 then return -2 end
    if manner.deaf and typed <= manner.deaf then return -2 end
  end
  return got
end

local function read_conf()
  for line in (read_file(top .. "/loader.conf") or ""):gmatch("[^\r\n]+") do
    local name, value = line:match('^%s*([%w_.]+)%s*=%s*"([^"]*)"')
    if not name then name, value = line:match("^%s*([%w_.]+)%s*=%s*([^%s#\"]+)") end
    if name then
      variables[name] = value
      if not KNOWN[name] then say("STANDIN: loader.conf: " .. name .. " is not known here") end
    elseif line:match("%S") and not line:match("^%s*#") then
      say("STANDIN: loader.conf: this line is no assignment: " .. line)
    end
  end
end

local function boot(flags)
  local kernel = top .. "/kernel/kernel"
  if on_disk and not io.open("/loader", "r") then
    say("boot2: /boot/loader: no such file")
    return
  end
  local file = io.open(kernel, "r")
  if not file then
    say("can't load 'kernel'")
    return
  end
  file:close()
  local root = variables["vfs.root.mountfrom"]
  if (variables.kernel_options or ""):match("C") then root = "cd9660:cd0" end
  if not on_disk then root = root or "cd9660:cd0" end
  if not root or root == "" then root = "none" end
  local console = CONSOLES[variables.console] or CONSOLES.vidconsole
  -- On a busy host an emulated timer may be so late that Linux gives up on it.
  local command = kernel .. " initrd=" .. top .. "/initrd.gz mountfrom=" .. root
  syslinux.run_command(command .. " " .. console .. " loglevel=4 no_timer_check" .. flags)
  say("can't load 'kernel'")
end

local function read_line()
  local line = ""
  while true do
    local got = key(0)
    if got == ENTER or got == LINE_FEED then
      io.write("\n")
      return line
    elseif got == BACKSPACE or got == DELETE then
      if #line > 0 then
        line = line:sub(1, -2)
        io.write("\b \b")
      end
    elseif got == 21 then -- Ctrl-U
      io.write("\n")
      line = ""
    elseif got >= 32 and got < 127 then
      line = line .. string.char(got)
      write(string.char(got))
    end
  end
end

local function run(line)
  local name, value = line:match("^%s*set%s+([%w_.]+)=(%S+)%s*$")
  local flags = line:match("^%s*boot(.*)$")
  if name then
    if name == "console" and not CONSOLES[value] then
      say("console " .. value .. " is invalid!")
    else
      variables[name] = value
    end
  elseif flags and flags:match("^%s*$") then
    boot("")
  elseif flags and flags:match("^%s+%-s%s*$") then
    boot(" single")
  elseif line:match("^%s*show") then
    for shown, is in pairs(variables) do say(shown .. "=" .. is) end
  elseif line:match("%S") then
    say("unknown command")
  end
end

local function prompt()
  print("")
  say("Type '?' for a list of commands, 'help' for more detailed help.")
  while true do
    io.write("\27[0m")
    write("OK ")
    run(read_line())
  end
end

local function chosen(choice)
  io.write("\n")
  if choice == "9" then
    prompt()
  elseif choice == "R" then
    syslinux.reboot()
  else
    read_conf()
    boot(choice == "s" and " single" or "")
    prompt()
  end
end

if manner.late then syslinux.msleep(manner.late) end
while syslinux.get_key(FLUSH) >= 0 do end
if on_disk then
  read_conf()
  if variables.autoboot_delay == "NO" then prompt() end
end
print("")
for _, line in ipairs({
  " 1. Boot DragonFly [Enter]",
  " 2. Boot DragonFly in safe mode",
  " 3. Boot DragonFly without AHCI driver",
  " 4. Boot DragonFly with ACPI disabled",
  " s. Boot DragonFly in single user mode",
  " v. Boot DragonFly with verbose logging",
  " 9. Escape to loader prompt (also ESC)",
  " R. Reboot computer",
  "",
}) do say(line) end

local counting = true
local left = tonumber(variables.autoboot_delay or "") or 10
while left > 0 do
  if counting then
    io.write("\r\27[1m")
    write("Booting in " .. left .. " seconds... ")
  end
  local got = key(counting and 1000 or 0)
  if got == ENTER or got == LINE_FEED then
    chosen("1")
  elseif got == ESCAPE then
    chosen("9")
  elseif got == SPACE then
    counting = false
  elseif got > 0 and string.char(got):match("[12349svR]") then
    chosen(string.char(got))
  elseif counting and got == -1 then
    left = left - 1
  end
end
chosen("1")
