# A label as disklabel64 prints it, edited -> the partitions, in the form that the stand-in keeps.
function bad(text) { print "disklabel64: line " FNR ": " text >"/dev/stderr"; errors++ }
function number(text) { return text ~ /^0x/ ? hex(substr(text, 3)) : text + 0 }
function hex(text,    i, n) {
    n = 0
    for (i = 1; i <= length(text); i++) n = n * 16 + index("0123456789abcdef", tolower(substr(text, i, 1))) - 1
    return n
}
function align(n) { return n - n % 4096 }
{ sub(/#.*/, ""); sub(/^[ \t]+/, ""); sub(/[ \t]+$/, "") }
$0 == "" { next }
!/:/ { bad("syntax error"); next }
{ key = $0; sub(/:.*/, "", key); value = $0; sub(/^[^:]*:[ \t]*/, "", value) }
key ~ /^[0-9]+ partitions$/ { limit = key + 0; next }
key == "diskid" { id = value; next }
key == "alignment" || key == "label" || key == "total size" { seen[key] = 1; next }
key == "boot2 data base" || key == "backup label" { seen[key] = 1; next }
key == "partitions data base" { if (number(value) != base) bad("the partitions' base has changed"); seen[key] = 1; next }
key == "partitions data stop" { seen[key] = 1; next }
key == "display block size" { block = value + 0; next }
key ~ /^[a-z]-stor_uuid$/ { next }
key !~ /^[a-z]$/ { bad(key ": Unknown disklabel field"); next }
{
    if (!limit || index("abcdefghijklmnop", key) > limit) { bad("partition name out of range: " key); next }
    if (!block) { bad("block size to use for partition display was not specified!"); next }
    if (split(value, field, /[ \t]+/) < 3) { bad("too few fields"); next }
    if (field[1] !~ /^([0-9]+[kKmMgGtT%]?|\*)$/) { bad("unknown size specifier: " field[1]); next }
    if (field[2] !~ /^([0-9]+|\*)$/) { bad("bad suffix on partition offset: " field[2]); next }
    if (tolower(field[3]) !~ /^(4\.2bsd|swap|hammer2|hammer|unused|ccd)$/) bad("unknown filesystem type " field[3])
    if (!(key in size)) order[++count] = key
    size[key] = field[1]; offset[key] = field[2]; type[key] = tolower(field[3])
}
END {
    if (!id || !seen["alignment"] || !seen["partitions data base"]) bad("this is no whole label")
    room = stop - base
    for (i = 1; i <= count; i++) {
        key = order[i]; text = size[key]; n = text + 0; suffix = tolower(substr(text, length(text)))
        if (text == "*") { if (hog) bad("Too many '*' partitions"); hog = key; continue }
        if (suffix == "%") { print "disklabel64: stand-in: no % here" >"/dev/stderr"; errors++; continue }
        bytes[key] = index("kmgt", suffix) ? n : n * block
        for (power = index("kmgt", suffix); power > 0; power--) bytes[key] *= 1024
        if (bytes[key] == 0) bad("bad partition size (0)")
        if (bytes[key] % 4096) bad("partition " key "'s size is not properly aligned")
        used += bytes[key]
    }
    if (hog) bytes[hog] = align(room - used)
    at = 0
    for (i = 1; i <= count; i++) {
        key = order[i]
        start[key] = offset[key] == "*" ? at : offset[key] * block
        if (start[key] < at) bad("partition " key " overlaps the one before it")
        at = start[key] + bytes[key]
        if (bytes[key] <= 0 || at > room) bad("partition " key ": offset past end of unit")
    }
    if (errors) exit 1
    print magic; print "diskid " id; print "boot " code
    for (i = 1; i <= count; i++) {
        key = order[i]
        printf "part %s %.0f %.0f %s\n", key, start[key], bytes[key], type[key]
    }
    print "end"
}
