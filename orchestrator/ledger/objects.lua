-- The verbs on the records of a bucket's objects (objects.py). ARGV[1] is the verb, ARGV[2] how long records are kept, s.
--
-- A record is "day|version|version...", the later version first; a version is "kind,etag,version,at,modified,order,id":
--   kind      c created, as told; l created, as listed; r removed
--   etag      digests of the eTag and of the version id; empty: not told
--   at        when it was made or removed, or, of l, when it was listed; ms by the store's clock
--   modified  what listings say of it (ms); empty: not known
--   order     what its sequencer sorts by; empty: it has none
--   id        of its event, until that is confirmed to be on the bus

local call = redis.call
local KEEP = ARGV[2]
local DAY = string.format('%d', math.floor(call('TIME')[1] / 86400))
-- Clocks of one store agree to this, and one upload notifies twice within it (ms).
local SLACK = 5000
-- The times of HTTP answers and of EventBridge have no fraction (ms).
local SECOND = 1000

-- A record keeps that many versions at least, and those of the last day (ms) up to that many.
local KEPT, KEPT_OF_A_DAY, A_DAY = 2, 8, 86400000

local KIND, ETAG, VERSION, AT, MODIFIED, ORDER, ID = 1, 2, 3, 4, 5, 6, 7

local function split(text, separator)
  local parts, from = {}, 1
  while true do
    local to = string.find(text, separator, from, true)
    if not to then
      parts[#parts + 1] = string.sub(text, from)
      return parts
    end
    parts[#parts + 1] = string.sub(text, from, to - 1)
    from = to + 1
  end
end

local function read(key, field)
  local text = call('HGET', key, field)
  if not text then return nil, {} end
  local parts, versions = split(text, '|'), {}
  for n = 2, #parts do
    local version = split(parts[n], ',')
    version[AT] = tonumber(version[AT])
    versions[#versions + 1] = version
  end
  return parts[1], versions
end

local function write(key, field, versions)
  local parts, since = { DAY }, versions[1][AT] - A_DAY
  for n = 1, math.min(#versions, KEPT_OF_A_DAY) do
    local version = versions[n]
    if n > KEPT and version[AT] < since then break end
    version[AT] = string.format('%d', version[AT])
    parts[n + 1] = table.concat(version, ',')
    version[AT] = tonumber(version[AT])
  end
  call('HSET', key, field, table.concat(parts, '|'))
  call('EXPIRE', key, KEEP)
end

local function may_equal(one, other) return one == other or one == '' or other == '' end

local function is_removal(version) return version[KIND] == 'r' end

-- Whether a sighting that was told is a version that is known; `newest` is the latest that is.
local function is_told_again(seen, version, newest)
  if is_removal(seen) ~= is_removal(version) then return false end
  if not is_removal(seen) and not may_equal(seen[ETAG], version[ETAG]) then return false end
  if not may_equal(seen[VERSION], version[VERSION]) then return false end
  if version[KIND] == 'l' then
    return seen[AT] >= tonumber(version[MODIFIED]) - SLACK and seen[AT] < version[AT] + SECOND
  end
  -- What came after the newest version is none that was before it; a sequencer may be the same for all.
  local is_cut_off = version[AT] % SECOND == 0 and seen[AT] < version[AT] + SECOND
  local is_later = version ~= newest and seen[AT] > newest[AT] and not is_cut_off
  if seen[ORDER] ~= '' and version[ORDER] ~= '' then
    return seen[ORDER] == version[ORDER] and not (is_later and newest[ORDER] == seen[ORDER])
  end
  return not is_later and math.abs(seen[AT] - version[AT]) <= SLACK
end

-- Whether what a listing shows is a version that is known.
local function is_listed_again(seen, version)
  if is_removal(version) or not may_equal(seen[ETAG], version[ETAG]) then return false end
  if version[MODIFIED] ~= '' then return seen[MODIFIED] == version[MODIFIED] end
  return tonumber(seen[MODIFIED]) <= version[AT] + SLACK
end

local function is_older(seen, version)
  if seen[ORDER] ~= '' and version[ORDER] ~= '' and seen[ORDER] ~= version[ORDER] then
    return seen[ORDER] < version[ORDER]
  end
  return seen[AT] < version[AT]
end

-- Returns what it is, the id of its event, and whether the record has changed.
local function told(seen, versions)
  local newest = versions[1]
  for _, version in ipairs(versions) do
    if is_told_again(seen, version, newest) then
      local is_listed = version[KIND] == 'l'
      if is_listed then
        version[KIND], version[AT], version[ORDER], version[VERSION] = 'c', seen[AT], seen[ORDER], seen[VERSION]
      end
      return version[ID] ~= '' and 'again' or 'known', version[ID], is_listed
    end
  end
  if newest and newest[ORDER] ~= '' and newest[ORDER] == seen[ORDER] then
    seen[ID] = seen[ID] .. string.format('-%d', seen[AT]) -- the sequencer is the same for all
  end
  if newest and is_older(seen, newest) and is_removal(seen) ~= is_removal(newest) then return 'late', '', false end
  local place = 1
  while versions[place] and is_older(seen, versions[place]) do place = place + 1 end
  table.insert(versions, place, seen)
  return 'new', seen[ID], true
end

local function listed(seen, versions, how)
  for _, version in ipairs(versions) do
    if is_listed_again(seen, version) then return version[ID] ~= '' and 'again' or 'known', version[ID], false end
  end
  if #versions > 0 and how ~= 'l' then return 'changed', '', false end
  if how == 's' then seen[ID] = '' end
  table.insert(versions, 1, seen)
  return how == 's' and 'known' or 'new', seen[ID], true
end

if ARGV[1] == 'claim' then
  local answer = {}
  for n, key in ipairs(KEYS) do
    local at = 3 + (n - 1) * 9
    local field, how = ARGV[at], ARGV[at + 1]
    local seen = {}
    for part = 1, 7 do seen[part] = ARGV[at + 1 + part] end
    seen[AT] = tonumber(seen[AT])
    local day, versions = read(key, field)
    local decide = how == 'n' and told or listed
    local verdict, id, is_changed = decide(seen, versions, how)
    if #versions > 0 and (is_changed or day ~= DAY) then write(key, field, versions) end
    answer[#answer + 1] = verdict
    answer[#answer + 1] = id
  end
  return answer
end

if ARGV[1] == 'confirm' then
  for n, key in ipairs(KEYS) do
    local field, id = ARGV[1 + 2 * n], ARGV[2 + 2 * n]
    local _, versions = read(key, field)
    for _, version in ipairs(versions) do
      if version[ID] == id then
        version[ID] = ''
        write(key, field, versions)
      end
    end
  end
  return 0
end

if ARGV[1] == 'sweep' then
  local before, gone = tonumber(ARGV[3]), 0
  for _, key in ipairs(KEYS) do
    local record = call('HGETALL', key)
    for n = 1, #record, 2 do
      if tonumber(string.match(record[n + 1], '^%d+')) < before then
        gone = gone + call('HDEL', key, record[n])
      end
    end
  end
  return gone
end
