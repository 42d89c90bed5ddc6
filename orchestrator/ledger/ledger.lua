-- Every atomic verb on the state of one run. KEYS are those of keys.RUN_KEYS, in that order; ARGV[1] is the verb.
-- The server's clock is the only clock. Nothing here loops over more than the run itself.
--
-- A unit is what a message carries: a link ("step") or a header part of a fan-out ("step/lo-hi"). A slot is what is
-- recorded: a step ("step") or an item of a fan-out ("step/index").

local RUN, GRAPH, STATES, UNITS, LEASES, OUTBOX, OUTPUTS, ATTEMPTS, ITEMS, LOGS =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local END = '$end'
local ENDED = { succeeded = true, failed = true, skipped = true, upstream_failed = true, cancelled = true }

local call = redis.call
local time = call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local function int(n) return string.format('%d', n) end
local NOW_S = int(NOW)

local rows = {}
local function graph(step) -- [pool, rule, upstreams, [downstream], [read], flags]
  local row = rows[step]
  if not row then
    row = cjson.decode(call('HGET', GRAPH, step))
    rows[step] = row
  end
  return row
end

local function is_in_flight()
  local state = call('HGET', RUN, 'state')
  return state == 'queued' or state == 'running'
end

local function split(unit) -- "step/lo-hi" -> step, lo, hi; "step" -> step
  local step, lo, hi = string.match(unit, '^(.-)/(%d+)-(%d+)$')
  if step then return step, tonumber(lo), tonumber(hi) end
  return unit
end

local function held(unit) -- fence, k, hi of a unit that was begun
  local text = call('HGET', UNITS, unit)
  if not text then return nil end
  local fence, k, hi = string.match(text, '^(%d+):(%d+):(%d+)$')
  return tonumber(fence), tonumber(k), tonumber(hi)
end

local function hold(unit, fence, k, hi) call('HSET', UNITS, unit, int(fence) .. ':' .. int(k) .. ':' .. int(hi)) end

local function slot_of(unit) -- what of a unit is in work: the step, or the item of a header part
  local step, lo = split(unit)
  if not lo then return step end
  local _, k = held(unit)
  return step .. '/' .. int(k)
end

local function new_part(step, lo, hi) -- a header part that nobody has begun: fence 0
  local unit = step .. '/' .. int(lo) .. '-' .. int(hi)
  hold(unit, 0, lo, hi)
  return unit
end

-- Joins ---------------------------------------------------------------------------------------------------------

local function decide(step, ready) -- returns the state that a join settles in without running, if it does
  if call('HGET', STATES, step) then return nil end -- queued or ended already
  local row = graph(step)
  local rule, ended = row[2], row[3]
  local counts = call('HMGET', STATES, 'u:' .. step, 'f:' .. step, 'k:' .. step)
  ended = tonumber(counts[1] or 0) >= ended
  local failed, skipped = tonumber(counts[2] or 0), tonumber(counts[3] or 0)
  if rule == 'one_failed' then
    if failed == 0 then return ended and 'skipped' or nil end
  elseif not ended then
    return nil
  elseif rule ~= 'all_done' then
    if failed > 0 then return 'upstream_failed' end
    if skipped > 0 and rule == 'all_success' then return 'skipped' end
  end
  call('HSET', STATES, step, 'queued')
  ready[#ready + 1] = step
end

local function settle(step, state, ready) -- a step has ended: tell the joins below, and below those that do not run
  local stack = { { step, state } }
  while #stack > 0 do
    local settled = table.remove(stack)
    step, state = settled[1], settled[2]
    call('HSET', STATES, step, state)
    if state == 'failed' then call('HSET', RUN, 'bad', '1') end
    for _, below in ipairs(graph(step)[4]) do
      call('HINCRBY', STATES, 'u:' .. below, 1)
      if state == 'failed' or state == 'upstream_failed' then
        call('HINCRBY', STATES, 'f:' .. below, 1)
      elseif state == 'skipped' then
        call('HINCRBY', STATES, 'k:' .. below, 1)
      end
      local undone = decide(below, ready)
      if undone then stack[#stack + 1] = { below, undone } end
    end
    if call('HINCRBY', RUN, 'left', -1) == 0 then
      call('HSET', STATES, END, 'queued')
      ready[#ready + 1] = END
    end
  end
end

local function close_record(slot, state, tail) -- tail: JSON members, "" or ',"error":{...}'
  local attempt = 1 + tonumber(call('HGET', ATTEMPTS, slot .. '#a') or 0)
  local field = slot .. '@' .. attempt
  local record = call('HGET', ATTEMPTS, field) or '{"fence":0}'
  call('HSET', ATTEMPTS, field,
    string.sub(record, 1, -2) .. ',"finished_at":' .. NOW_S .. ',"state":"' .. state .. '"' .. tail .. '}')
end

local function end_item(step, index, state, ready)
  call('HSET', STATES, step .. '/' .. index, state)
  local bad = 0
  if state == 'failed' then bad = call('HINCRBY', STATES, 'b:' .. step, 1) end
  local counts = call('HMGET', STATES, 'n:' .. step, 'c:' .. step, 'b:' .. step)
  local n = tonumber(counts[1])
  if counts[2] and tonumber(counts[2]) < n then -- max_parallel: one ends, one begins
    local lo = tonumber(counts[2])
    call('HINCRBY', STATES, 'c:' .. step, 1)
    ready[#ready + 1] = new_part(step, lo, lo + 1)
  end
  if call('HINCRBY', STATES, 'd:' .. step, 1) == n then
    local whole = counts[3] and 'failed' or 'succeeded'
    close_record(step, whole, '')
    settle(step, whole, ready)
  end
end

-- Begin ---------------------------------------------------------------------------------------------------------

local function many(key, prefix, n) -- HMGET of prefix .. 0 .. n-1; what is absent is ''
  local values = {}
  for lo = 0, n - 1, 1000 do
    local fields = {}
    for i = lo, math.min(lo + 1000, n) - 1 do fields[#fields + 1] = prefix .. int(i) end
    for _, value in ipairs(call('HMGET', key, unpack(fields))) do values[#values + 1] = value or '' end
  end
  return values
end

local function last_record(slot)
  return call('HGET', ATTEMPTS, slot .. '@' .. (1 + tonumber(call('HGET', ATTEMPTS, slot .. '#a') or 0))) or ''
end

local function inputs(step) -- {id, state, payload or list of payloads, [records of failures]} for each step that is read
  local found = {}
  for _, id in ipairs(graph(step)[5]) do
    local state = call('HGET', STATES, id) or 'scheduled'
    local value, failures = call('HGET', OUTPUTS, id) or '', {}
    local n = tonumber(call('HGET', STATES, 'n:' .. id))
    if n then
      value = many(OUTPUTS, id .. '/', n)
      if call('HGET', STATES, 'b:' .. id) then
        for i, one in ipairs(many(STATES, id .. '/', n)) do
          if one == 'failed' then failures[#failures + 1] = { i - 1, last_record(id .. '/' .. int(i - 1)) } end
        end
      end
    elseif state == 'failed' then
      failures[1] = { -1, last_record(id) }
    end
    found[#found + 1] = { id, state, value, failures }
  end
  return found
end

local function meta()
  local values = call('HMGET', RUN, 'workflow', 'plan', 'event', 'input', 'created_at', 'episode', 'event_id')
  for i = 1, 7 do values[i] = values[i] or '' end
  return values
end

local function chunk(step, index, known) -- {items per chunk, number of the chunk, payload}; {} if the caller has it
  local per = tonumber(call('HGET', ITEMS, 'per:' .. step))
  local number = math.floor(index / per)
  if known == step .. ':' .. int(number) then return {} end
  return { per, number, call('HGET', ITEMS, step .. ':' .. int(number)) or '' }
end

local function final_states() -- {step, state, ...} if a step failed: whether the run did is for the plan to say
  local found = {}
  if call('HEXISTS', RUN, 'bad') == 1 then
    for _, step in ipairs(call('HKEYS', GRAPH)) do
      found[#found + 1] = step
      found[#found + 1] = call('HGET', STATES, step) or ''
    end
  end
  return found
end

-- how: {lease_ms, record, known run, known chunk}. Takes a unit that is ready or was lost, and says what to run. With
-- `goes_on` it is the next item of a part that the caller holds already: the same fence, and no inputs again.
local function take(unit, how, goes_on)
  local step, lo, hi = split(unit)
  local fence, k, end_ = held(unit)
  if lo then
    k, hi = k or lo, end_ or hi
    while k < hi and ENDED[call('HGET', STATES, step .. '/' .. int(k)) or ''] do k = k + 1 end
    if k >= hi then return nil end
  end
  if not goes_on then fence = call('HINCRBY', RUN, 'fence', 1) end
  hold(unit, fence, k or 0, hi or 0)
  call('ZADD', LEASES, NOW + how[1], unit)
  call('ZREM', OUTBOX, unit)
  local slot = lo and (step .. '/' .. int(k)) or step
  if not lo and step ~= END then call('HSETNX', RUN, 'started_at', NOW_S) end
  call('HSET', STATES, slot, 'running')
  local counts = call('HMGET', ATTEMPTS, slot .. '#a', slot .. '#l')
  local attempt, losses = 1 + tonumber(counts[1] or 0), tonumber(counts[2] or 0)
  call('HSET', ATTEMPTS, slot .. '@' .. attempt,
    how[2] .. ',"fence":' .. int(fence) .. ',"started_at":' .. NOW_S .. '}')
  if call('HGET', RUN, 'state') == 'queued' then call('HSET', RUN, 'state', 'running') end
  return {
    unit, fence, lo and k or -1, attempt, losses, NOW,
    goes_on and {} or inputs(step),
    how[3] == '1' and {} or meta(),
    lo and chunk(step, k, how[4]) or (step == END and final_states() or {}),
    lo and tonumber(call('HGET', STATES, 'n:' .. step)) or 0,
  }
end

-- After something has ended: go on inline with what this pool may take, leave the rest in the outbox.
-- inline: the caller's pool, '' to take nothing. Answers {verdict, what to run or {}, units to publish}.
local function go_on(ready, inline, how, verdict)
  local taken = {}
  local publish = {}
  for _, unit in ipairs(ready) do
    local pool = graph((split(unit)))[1]
    if inline ~= '' and #taken == 0 and (pool == inline or pool == '*') then
      taken = take(unit, how) or {}
    else
      call('ZADD', OUTBOX, NOW, unit)
      publish[#publish + 1] = unit
    end
  end
  return { verdict, taken, publish }
end

local function how_at(i) return { tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2], ARGV[i + 3] }, ARGV[i + 4] end

local function tell(channel, run, state, problem) -- that a run has ended; problem: JSON or ""
  local told = { run = run, workflow = call('HGET', RUN, 'workflow'), state = state, error = problem }
  call('PUBLISH', channel, cjson.encode(told))
end

local verbs = {}

-- start: n, then n pairs (graph), m, then m roots, then field/value pairs of the run
function verbs.start()
  if call('EXISTS', RUN) == 1 then return { 'exists', call('HGET', RUN, 'state') } end
  local i = 2
  local n = tonumber(ARGV[i])
  for _ = 1, n do
    call('HSET', GRAPH, ARGV[i + 1], ARGV[i + 2])
    i = i + 2
  end
  i = i + 1
  for _ = 1, tonumber(ARGV[i]) do
    i = i + 1
    call('HSET', STATES, ARGV[i], 'queued')
    call('ZADD', OUTBOX, NOW, ARGV[i])
  end
  call('HSET', RUN, 'created_at', NOW_S, 'episode', '1', 'left', int(n - 1), 'fence', '0', unpack(ARGV, i + 1))
  return { 'started', 'queued' }
end

-- refuse: retention_s, channel, run, then field/value pairs of the run. It has failed before its first step.
function verbs.refuse()
  if call('EXISTS', RUN) == 1 then return 0 end
  call('HSET', RUN, 'state', 'failed', 'episode', '1', unpack(ARGV, 5))
  call('EXPIRE', RUN, ARGV[2])
  tell(ARGV[3], ARGV[4], 'failed', call('HGET', RUN, 'error') or '')
  return 1
end

local function took(unit, how) -- whether the process that asks is the one that has taken this unit
  return string.sub(last_record(slot_of(unit)), 1, #how[2]) == how[2]
end

-- What this process has taken: a process asks for more only if it runs nothing, so an answer to it was lost.
local function lost_answer(how)
  for _, unit in ipairs(call('ZRANGE', LEASES, 0, -1)) do
    if took(unit, how) then return take(unit, how) or {} end
  end
  return {}
end

-- begin: lease_ms, record, known run, known chunk, then the units of the message in order
function verbs.begin()
  local how = how_at(2)
  local state = call('HGET', RUN, 'state')
  if not state then return { 'unknown' } end
  if not is_in_flight() then return { 'done' } end
  for i = 6, #ARGV do
    local unit = ARGV[i]
    local step, lo = split(unit)
    local done
    if lo then
      done = ENDED[call('HGET', STATES, step) or '']
    else
      done = ENDED[call('HGET', STATES, unit) or '']
    end
    if not done then
      if not lo then
        if not call('HGET', STATES, unit) then return { 'early' } end
        -- expanded, or waiting for a nested run: others go on with it
        if call('HEXISTS', STATES, 'n:' .. unit) == 1 or call('HEXISTS', STATES, 'w:' .. unit) == 1 then
          return { 'done' }
        end
      end
      -- Also when the lease has run out: the sweep, which knows whether it could be renewed, gives it up.
      if call('ZSCORE', LEASES, unit) and not took(unit, how) then return { 'held' } end
      local taken = take(unit, how)
      if taken then return { 'go', taken, {} } end
    end
  end
  return { 'done' }
end

-- complete: unit, fence, index or -1, state, payload, tail, log, lease_ms, record, known run, known chunk, inline
-- state "waiting": the slot waits for the nested run whose id is the payload.
function verbs.complete()
  local unit, fence, index, state, payload, tail, log =
    ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7], ARGV[8]
  local how, inline = how_at(9)
  local holder, k, hi = held(unit)
  if holder ~= fence then return { 'refused' } end
  local step, lo = split(unit)
  local slot = lo and (step .. '/' .. int(index)) or step
  if lo and k ~= index then return { 'done', lost_answer(how), {} } end
  local ready = {}
  local now = call('HMGET', STATES, slot, 'n:' .. slot)
  local fresh = not ENDED[now[1] or ''] and not now[2] -- a fan-out that was expanded is ended by its items
  if fresh then
    if log ~= '' then call('HSET', LOGS, slot .. '@' .. (1 + tonumber(call('HGET', ATTEMPTS, slot .. '#a') or 0)), log) end
    if state == 'waiting' then
      call('HSET', STATES, 'w:' .. slot, payload)
    else
      if payload ~= '' then call('HSET', OUTPUTS, slot, payload) end
      close_record(slot, state, tail)
      if lo then end_item(step, index, state, ready) else settle(step, state, ready) end
    end
  elseif not lo then
    call('ZREM', LEASES, unit)
    return { 'done', lost_answer(how), {} }
  end
  if not lo then
    call('ZREM', LEASES, unit)
    return go_on(ready, inline, how, 'ok')
  end
  hold(unit, fence, index + 1, hi)
  if index + 1 >= hi then
    call('ZREM', LEASES, unit)
    return go_on(ready, inline, how, 'ok')
  end
  if inline == '' then -- draining: what was not begun goes back as it is
    call('ZREM', LEASES, unit)
    ready[#ready + 1] = unit
    return go_on(ready, '', how, 'ok')
  end
  local answer = go_on(ready, '', how, 'ok')
  answer[2] = take(unit, how, true) or {}
  if #answer[2] == 0 then call('ZREM', LEASES, unit) end
  return answer
end

-- expand: step, fence, count, items per part, max_parallel or 0, items per chunk, lease_ms, record, known run, known
-- chunk, inline, then the chunks
function verbs.expand()
  local step, fence, n, size, parallel, per =
    ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
  local how, inline = how_at(8)
  if held(step) ~= fence then return { 'refused' } end
  if call('HEXISTS', STATES, 'n:' .. step) == 1 then return { 'done', lost_answer(how), {} } end
  call('HSET', STATES, 'n:' .. step, int(n))
  call('ZREM', LEASES, step)
  local ready = {}
  if n == 0 then
    close_record(step, 'succeeded', '')
    settle(step, 'succeeded', ready)
    return go_on(ready, inline, how, 'ok')
  end
  call('HSET', ITEMS, 'per:' .. step, per)
  for i = 13, #ARGV do call('HSET', ITEMS, step .. ':' .. int(i - 13), ARGV[i]) end
  local last = n
  if parallel > 0 and parallel < n then
    last = parallel
    call('HSET', STATES, 'c:' .. step, int(last))
  end
  for lo = 0, last - 1, size do
    ready[#ready + 1] = new_part(step, lo, math.min(lo + size, n))
  end
  return go_on(ready, inline, how, 'ok')
end

-- resolve: step, index or -1, id of the nested run, state, payload, tail. The nested run of a slot has ended.
function verbs.resolve()
  local step, index, child, state, payload, tail = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6], ARGV[7]
  local slot = index >= 0 and (step .. '/' .. int(index)) or step
  local now = call('HGET', STATES, slot)
  if not now or ENDED[now] or not is_in_flight() then return { 'done', {}, {} } end
  call('HSET', STATES, 'w:' .. slot, child)
  if payload ~= '' then call('HSET', OUTPUTS, slot, payload) end
  close_record(slot, state, tail)
  local ready = {}
  if index >= 0 then end_item(step, index, state, ready) else settle(step, state, ready) end
  return go_on(ready, '', {}, 'ok')
end

local function end_run(state, payload, problem, retention, channel, run)
  call('HSET', RUN, 'state', state, 'finished_at', NOW_S)
  if payload ~= '' then call('HSET', RUN, 'output', payload) end
  if problem ~= '' then call('HSET', RUN, 'error', problem) end
  call('DEL', LEASES, OUTBOX)
  local parent = call('HGET', RUN, 'parent') or ''
  if parent ~= '' then call('ZADD', OUTBOX, NOW, '^parent') end
  for _, key in ipairs(KEYS) do call('EXPIRE', key, retention) end
  tell(channel, run, state, problem)
  return parent
end

-- finish: fence, state, payload, error (JSON or ""), retention_s, channel. Ends the run's episode.
function verbs.finish()
  local fence, state, payload, problem, retention, channel = tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
  if held(END) ~= fence then return { 'refused' } end
  if ENDED[call('HGET', STATES, END) or ''] then return { 'done' } end
  call('HSET', STATES, END, 'succeeded')
  return { 'ok', end_run(state, payload, problem, retention, channel, ARGV[8]) }
end

-- give_up: error (JSON), retention_s, channel, run. Ends a run that cannot go on; answers {1 if it was in flight, parent}.
function verbs.give_up()
  if not is_in_flight() then return { 0, '' } end
  call('DEL', UNITS) -- so whoever still runs one is refused
  return { 1, end_run('failed', '', ARGV[2], ARGV[3], ARGV[4], ARGV[5]) }
end

-- clear: units. They were published.
function verbs.clear()
  for i = 2, #ARGV, 1000 do call('ZREM', OUTBOX, unpack(ARGV, i, math.min(i + 999, #ARGV))) end
  if is_in_flight() then call('HINCRBY', RUN, 'cleared', 1) end
  return call('ZCARD', OUTBOX)
end

local function lose(unit) -- whoever ran this unit is gone: it is to be published again, and the loss is counted
  call('ZREM', LEASES, unit)
  call('ZADD', OUTBOX, NOW, unit)
  call('HINCRBY', ATTEMPTS, slot_of(unit) .. '#l', 1)
end

-- What of a run changes whenever something is taken or published, and the plan; '' unless it is in flight with nothing
-- in the outbox and nothing in work: then all that goes on with it is messages.
local function idle()
  if not is_in_flight() or call('EXISTS', OUTBOX, LEASES) > 0 then return '' end
  local fields = call('HMGET', RUN, 'fence', 'cleared', 'plan')
  return fields[1] .. ':' .. (fields[2] or '0') .. ':' .. fields[3]
end

-- look: age_ms. Answers 1 if a sweep would find something, or the run is not in flight; else 0, or what `idle` says.
function verbs.look()
  if not is_in_flight() then return 1 end
  if call('ZCOUNT', OUTBOX, '-inf', NOW - tonumber(ARGV[2])) > 0 then return 1 end
  if call('ZCOUNT', LEASES, '-inf', NOW) > 0 then return 1 end
  local version = idle()
  return version == '' and 0 or version
end

-- sweep: age_ms, whether to give up leases that ran out ("1" or ""). Answers {state, units to publish again, how many
-- of them were lost, rows left in the outbox}.
function verbs.sweep()
  local state = call('HGET', RUN, 'state')
  if not state then return { '', {}, 0, 0 } end
  local again = call('ZRANGEBYSCORE', OUTBOX, '-inf', NOW - tonumber(ARGV[2]), 'LIMIT', 0, 500)
  for _, unit in ipairs(again) do call('ZADD', OUTBOX, 'XX', NOW, unit) end
  local lost = ARGV[3] == '1' and call('ZRANGEBYSCORE', LEASES, '-inf', NOW, 'LIMIT', 0, 500) or {}
  for _, unit in ipairs(lost) do
    lose(unit)
    again[#again + 1] = unit
  end
  return { state, again, #lost, call('ZCARD', OUTBOX) }
end

-- limbo: what `look` has said. Answers the units that only a message can bring on, if nothing has moved since.
function verbs.limbo()
  if idle() ~= ARGV[2] then return {} end
  local states, found = {}, {}
  local flat = call('HGETALL', STATES)
  for i = 1, #flat, 2 do states[flat[i]] = flat[i + 1] end
  for slot, state in pairs(states) do
    if (state == 'queued' or state == 'running') and not string.find(slot, '[:/]')
      and not states['n:' .. slot] and not states['w:' .. slot] then
      found[#found + 1] = slot
    end
  end
  for _, unit in ipairs(call('HKEYS', UNITS)) do
    local step, lo = split(unit)
    if lo then
      local _, k, hi = held(unit)
      while k < hi and ENDED[states[step .. '/' .. int(k)] or ''] do k = k + 1 end
      if k < hi then found[#found + 1] = unit end
    end
  end
  return found
end

local function is_begun(unit) -- and neither ended nor handed on, to its items or to a nested run
  local slot = slot_of(unit)
  local fields = call('HMGET', STATES, slot, 'n:' .. slot, 'w:' .. slot)
  return fields[1] == 'running' and not fields[2] and not fields[3]
end

-- renew: lease_ms, then pairs (unit, fence). Answers the units that are no longer the caller's. A lease that was given up
-- is the caller's again if nobody has taken over.
function verbs.renew()
  local gone = {}
  for i = 3, #ARGV, 2 do
    local unit = ARGV[i]
    if held(unit) ~= tonumber(ARGV[i + 1]) then
      gone[#gone + 1] = unit
    elseif call('ZSCORE', LEASES, unit) or is_begun(unit) then
      call('ZADD', LEASES, NOW + tonumber(ARGV[2]), unit)
      call('ZREM', OUTBOX, unit)
    end
  end
  return gone
end

-- abandon: the opening of the records of a process that has died. Answers the units that it had taken, which are to be
-- published again.
function verbs.abandon()
  local lost = {}
  for _, unit in ipairs(call('ZRANGE', LEASES, 0, -1)) do
    if took(unit, { 0, ARGV[2] }) then
      lose(unit)
      lost[#lost + 1] = unit
    end
  end
  return lost
end

-- give_back: unit, fence, items per part. The items after the one in work go back, as new parts.
function verbs.give_back()
  local unit, size = ARGV[2], tonumber(ARGV[4])
  local fence, k, hi = held(unit)
  if fence ~= tonumber(ARGV[3]) or k + 1 >= hi then return {} end
  local step = split(unit)
  hold(unit, fence, k, k + 1)
  local publish = {}
  for lo = k + 1, hi - 1, size do
    local part = new_part(step, lo, math.min(lo + size, hi))
    call('ZADD', OUTBOX, NOW, part)
    publish[#publish + 1] = part
  end
  return publish
end

-- log: slot, attempt, text. Keeps the captured text, so far, of an attempt that goes on.
function verbs.log()
  -- It has ended meanwhile: its whole text is there, and the run may have a TTL.
  if call('HGET', STATES, ARGV[2]) ~= 'running' or not is_in_flight() then return 0 end
  call('HSET', LOGS, ARGV[2] .. '@' .. ARGV[3], ARGV[4])
  return 1
end

return verbs[ARGV[1]]()
