-- Every atomic verb on the state of one run. KEYS are those of keys.RUN_KEYS, in that order; ARGV[1] is the verb.
-- The server's clock is the only clock. Nothing here loops over more than the run itself.
--
-- A unit is what a message carries: a link ("step") or a header part of a fan-out ("step/lo-hi"). A slot is what is
-- recorded: a step ("step") or an item of a fan-out ("step/index").

--
-- Rows of the outbox that begin with "!" or "^" are chores for whoever called (keys.py), not units.

local RUN, GRAPH, STATES, UNITS, LEASES, OUTBOX, OUTPUTS, ATTEMPTS, ITEMS, LOGS, TIMERS =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local END, DEADLINE = '$end', '$deadline'
-- The last argument of every call: how long to keep a run, one that failed, and where to tell of ends.
local KEEP, KEEP_FAILED, CHANNEL = string.match(table.remove(ARGV), '^(%d+),(%d+),(.*)$')
local ID = string.match(RUN, '{(.*)}')
local ENDED = { succeeded = true, failed = true, skipped = true, upstream_failed = true, cancelled = true }

local call = redis.call
local time = call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local function int(n) return string.format('%d', n) end
local NOW_S = int(NOW)

local rows = {}
local function graph(step) -- [pool, rule, upstreams, [downstream], [read], flags, phase]
  local row = rows[step]
  if not row then
    row = cjson.decode(call('HGET', GRAPH, step))
    row[7] = row[7] or ''
    rows[step] = row
  end
  return row
end

local function is_in_flight()
  local state = call('HGET', RUN, 'state')
  return state == 'queued' or state == 'running'
end

local function steps_of(phase) -- ids of the steps of a phase
  local found = {}
  if phase ~= '' and call('HEXISTS', RUN, 'hooks') == 0 then return found end
  for _, step in ipairs(call('HKEYS', GRAPH)) do
    if step ~= END and graph(step)[7] == phase then found[#found + 1] = step end
  end
  return found
end

local function split(unit) -- "step/lo-hi" -> step, lo, hi; "step" -> step
  local step, lo, hi = string.match(unit, '^(.-)/(%d+)-(%d+)$')
  if step then return step, tonumber(lo), tonumber(hi) end
  return unit
end

local function slot_at(step, index) -- the step, or with an index from 0 its item
  return index >= 0 and (step .. '/' .. int(index)) or step
end

local function chore(row, ready) -- for whoever called, and in the outbox until it is done
  call('ZADD', OUTBOX, NOW, row)
  ready[#ready + 1] = row
end

local function drop_units() -- what waits to be published will not be; chores stay
  for _, row in ipairs(call('ZRANGE', OUTBOX, 0, -1)) do
    if not string.find(row, '^[!^]') then call('ZREM', OUTBOX, row) end
  end
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

local function first_open(step, k, hi) -- the first item from k on that has not ended; hi if all before it have
  while k < hi and ENDED[call('HGET', STATES, step .. '/' .. int(k)) or ''] do k = k + 1 end
  return k
end

local function new_part(step, lo, hi) -- a header part that nobody has begun: fence 0
  local unit = step .. '/' .. int(lo) .. '-' .. int(hi)
  hold(unit, 0, lo, hi)
  return unit
end

-- Joins ---------------------------------------------------------------------------------------------------------

local stopping -- of this phase, nothing further is begun: "cancelled", "timeout", or false; read when first asked for

local function is_stopping()
  if stopping == nil then stopping = call('HGET', RUN, 'stopping') end
  return stopping
end

-- A slot that was cancelled by itself while it was at work: it is told to stop, and begins no further attempt.
local function is_to_stop(slot) return is_stopping() or call('HEXISTS', STATES, 's:' .. slot) == 1 end

local function decide(step, ready) -- returns the state that a join settles in without running, if it does
  if is_stopping() or call('HGET', STATES, step) then return nil end -- queued or ended already
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

local function last_record(slot)
  return call('HGET', ATTEMPTS, slot .. '@' .. (1 + tonumber(call('HGET', ATTEMPTS, slot .. '#a') or 0))) or ''
end

local ends = false -- whether the run ends in this call: then its keys get a time to live, last of all

local function end_run(state, payload, problem, ready)
  call('HSET', RUN, 'state', state, 'finished_at', NOW_S)
  if payload ~= '' then call('HSET', RUN, 'output', payload) end
  if problem ~= '' then call('HSET', RUN, 'error', problem) end
  call('DEL', LEASES, TIMERS)
  drop_units()
  ends = true
  if call('HEXISTS', RUN, 'parent') == 1 then call('ZADD', OUTBOX, NOW, '^ended') end
  ready[#ready + 1] = call('EXISTS', OUTBOX) == 1 and '^ended' or '^close'
  local told = { run = ID, workflow = call('HGET', RUN, 'workflow'), state = state, error = problem }
  call('PUBLISH', CHANNEL, cjson.encode(told))
end

local function enter(phase, ready) -- begin the steps of a phase; false if it has none
  local steps = steps_of(phase)
  if #steps == 0 then return false end
  call('HSET', RUN, 'phase', phase, 'left', int(#steps))
  for _, step in ipairs(steps) do
    if graph(step)[3] == 0 then
      call('HSET', STATES, step, 'queued')
      ready[#ready + 1] = step
    end
  end
  return true
end

local function go_to_next_phase(ready) -- on_failure, if the run failed; finally; then the run ends
  local fields = call('HMGET', RUN, 'phase', 'end_state', 'end_output', 'end_error', 'hook_failed')
  local phase, state, problem, hook = fields[1] or '', fields[2], fields[4], fields[5]
  call('HDEL', RUN, 'stopping')
  stopping = false
  if phase == '' then
    if state == 'failed' then
      if enter('on_failure', ready) then return end
    else
      for _, step in ipairs(steps_of('on_failure')) do call('HSET', STATES, step, 'skipped') end
    end
  end
  if phase ~= 'finally' and enter('finally', ready) then return end
  if state == 'succeeded' and hook then -- what was to clean up has not
    -- What Python takes for JSON may be none for cjson (a lone surrogate), and a fan-out's own record has no error.
    local readable, record = pcall(cjson.decode, last_record(hook))
    local reason = readable and record.error or { type = 'Failed', message = 'the hook ' .. hook .. ' has failed' }
    state, problem = 'failed', cjson.encode({ type = reason.type, message = reason.message, step = (split(hook)) })
  end
  end_run(state, state == 'succeeded' and fields[3] or '', problem, ready)
end

local function conclude(state, payload, problem, ready) -- what the run comes to is known; its hooks are still to run
  call('ZREM', TIMERS, DEADLINE)
  call('HDEL', RUN, 'deadline') -- it is not that of the hooks
  call('HSET', RUN, 'end_state', state, 'end_output', payload, 'end_error', problem)
  go_to_next_phase(ready)
end

local function end_phase(ready) -- every step of the phase has ended
  local cause = is_stopping()
  if (call('HGET', RUN, 'phase') or '') ~= '' then
    if cause then call('HSET', RUN, 'end_state', 'cancelled') end
    go_to_next_phase(ready)
  elseif cause == 'timeout' then
    local words = 'the run has reached its timeout'
    conclude('failed', '', cjson.encode({ type = 'RunTimeout', message = words }), ready)
  elseif cause then
    conclude('cancelled', '', '', ready)
  else
    call('HSET', STATES, END, 'queued')
    ready[#ready + 1] = END
  end
end

local NOT_THERE = { failed = true, upstream_failed = true, cancelled = true }

local function note(step, state) -- a step has ended: count it for the joins below, and for what the run comes to
  if state == 'failed' or state == 'cancelled' then
    call('HSET', RUN, graph(step)[7] == '' and 'bad' or 'hook_failed', step)
  end
  for _, below in ipairs(graph(step)[4]) do
    call('HINCRBY', STATES, 'u:' .. below, 1)
    if NOT_THERE[state] then
      call('HINCRBY', STATES, 'f:' .. below, 1)
    elseif state == 'skipped' then
      call('HINCRBY', STATES, 'k:' .. below, 1)
    end
  end
end

local function settle(step, state, ready) -- a step has ended: tell the joins below, and below those that do not run
  local stack = { { step, state } }
  while #stack > 0 do
    local settled = table.remove(stack)
    step, state = settled[1], settled[2]
    call('HSET', STATES, step, state)
    note(step, state)
    for _, below in ipairs(graph(step)[4]) do
      local undone = decide(below, ready)
      if undone then stack[#stack + 1] = { below, undone } end
    end
    if call('HINCRBY', RUN, 'left', -1) == 0 then end_phase(ready) end
  end
end

local function close_record(slot, state, tail) -- tail: JSON members, "" or ',"error":{...}'
  local attempt = 1 + tonumber(call('HGET', ATTEMPTS, slot .. '#a') or 0)
  local field = slot .. '@' .. attempt
  local record = call('HGET', ATTEMPTS, field) or '{"fence":0}'
  call('HSET', ATTEMPTS, field,
    string.sub(record, 1, -2) .. ',"finished_at":' .. NOW_S .. ',"state":"' .. state .. '"' .. tail .. '}')
end

local USED = { 'wall', 'cpu', 'memory' }

local function use(step, usage) -- what an attempt took, "wall:cpu:memory", adds to that of its step and of the run
  local i = 0
  for n in string.gmatch(usage, '%d+') do
    i = i + 1
    call('HINCRBY', ATTEMPTS, step .. '#' .. USED[i], n)
    call('HINCRBY', RUN, 'used_' .. USED[i], n)
  end
end

local function end_items(step, ended, ready) -- so many items more have ended
  local counts = call('HMGET', STATES, 'n:' .. step, 'b:' .. step, 'x:' .. step)
  if call('HINCRBY', STATES, 'd:' .. step, ended) == tonumber(counts[1]) then
    local whole = counts[3] and 'cancelled' or counts[2] and 'failed' or 'succeeded'
    close_record(step, whole, '')
    settle(step, whole, ready)
  end
end

local function end_item(step, index, state, ready)
  call('HSET', STATES, step .. '/' .. index, state)
  if state == 'failed' then call('HINCRBY', STATES, 'b:' .. step, 1) end
  if state == 'cancelled' then call('HINCRBY', STATES, 'x:' .. step, 1) end
  local handed_out = call('HGET', STATES, 'c:' .. step)
  if handed_out then -- max_parallel: one ends, one begins
    local again = call('HGET', ITEMS, 'again:' .. step) or '' -- items of an earlier episode come first: "3,17,"
    local first, rest = string.match(again, '^(%d+),(.*)$')
    if first then
      call('HSET', ITEMS, 'again:' .. step, rest)
      ready[#ready + 1] = new_part(step, tonumber(first), tonumber(first) + 1)
    elseif tonumber(handed_out) < tonumber(call('HGET', STATES, 'n:' .. step)) then
      local lo = tonumber(handed_out)
      call('HINCRBY', STATES, 'c:' .. step, 1)
      ready[#ready + 1] = new_part(step, lo, lo + 1)
    end
  end
  end_items(step, 1, ready)
end

-- A slot that was begun is cancelled: its nested run may be there, and who started it died before it could say so.
local function cancel_nested(step, slot, ready)
  if string.find(graph(step)[6], 'n') and call('HEXISTS', STATES, 'w:' .. slot) == 0 then
    chore('^cancel:' .. slot, ready)
  end
end

local function end_slot(step, index, state, tail, ready) -- index -1: the step itself
  local slot = slot_at(step, index)
  close_record(slot, state, tail)
  if state == 'cancelled' then cancel_nested(step, slot, ready) end
  if state == 'failed' and not call('HGET', STATES, 'w:' .. slot) then -- of a nested run the letter is its own
    chore('!' .. slot, ready)
  end
  if index >= 0 then end_item(step, index, state, ready) else settle(step, state, ready) end
end

local function end_named(slot, state, ready) -- as end_slot, of a slot by its name
  local step, index = string.match(slot, '^(.-)/(%d+)$')
  end_slot(step or slot, tonumber(index or -1), state, '', ready)
end

local function put_off(step, index, state, tail, delay_ms) -- a slot waits for its time: retrying, postponed, sleeping
  local slot = slot_at(step, index)
  local member = index >= 0 and (step .. '/' .. int(index) .. '-' .. int(index + 1)) or step
  if state == 'sleeping' then
    call('HSET', STATES, 'w:' .. slot, '~')
    member = '~' .. slot
  else
    call('HSET', STATES, slot, 'retrying')
    if index >= 0 then new_part(step, index, index + 1) end
    if state == 'retrying' then
      close_record(slot, 'failed', tail)
      call('HINCRBY', ATTEMPTS, slot .. '#a', 1)
      call('HDEL', ATTEMPTS, slot .. '#u')
    else
      call('HSETNX', ATTEMPTS, slot .. '#u', NOW_S)
    end
  end
  call('ZADD', TIMERS, NOW + delay_ms, member)
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
  local values = call('HMGET', RUN, 'workflow', 'plan', 'event', 'input', 'created_at', 'episode', 'event_id',
    'deadline', 'phase', 'end_state', 'end_error', 'priority')
  for i = 1, 12 do values[i] = values[i] or '' end
  return values
end

local function chunk(step, index, known) -- {items per chunk, number of the chunk, payload}; {} if the caller has it
  local per = tonumber(call('HGET', ITEMS, 'per:' .. step))
  local number = math.floor(index / per)
  if known == step .. ':' .. int(number) then return {} end
  return { per, number, call('HGET', ITEMS, step .. ':' .. int(number)) or '' }
end

-- {step, state, ...} if a step failed or was cancelled: whether the run did is for the plan to say.
local function final_states()
  local found = {}
  if call('HEXISTS', RUN, 'bad') == 1 then
    for _, step in ipairs(call('HKEYS', GRAPH)) do
      found[#found + 1] = step
      found[#found + 1] = call('HGET', STATES, step) or ''
    end
  end
  return found
end

-- how: {lease_ms, record, known episode and phase of the run, known chunk}. Takes a unit that is ready or was lost, and
-- says what to run. With `goes_on` it is the next item of a part that the caller holds already: the same fence, and no
-- inputs again.
local function take(unit, how, goes_on)
  local step, lo, hi = split(unit)
  local fence, k, end_ = held(unit)
  if lo then
    hi = end_ or hi
    k = first_open(step, k or lo, hi)
    if k >= hi then return nil end
  end
  if not goes_on then fence = call('HINCRBY', RUN, 'fence', 1) end
  hold(unit, fence, k or 0, hi or 0)
  call('ZADD', LEASES, NOW + how[1], unit)
  call('ZREM', OUTBOX, unit)
  local slot = lo and (step .. '/' .. int(k)) or step
  if not lo and step ~= END then call('HSETNX', RUN, 'started_at', NOW_S) end
  call('HSET', STATES, slot, 'running')
  local counts = call('HMGET', ATTEMPTS, slot .. '#a', slot .. '#b', slot .. '#l', slot .. '#k', slot .. '#u', slot .. '#m')
  local attempt = 1 + tonumber(counts[1] or 0)
  call('HSET', ATTEMPTS, slot .. '@' .. attempt,
    how[2] .. ',"fence":' .. int(fence) .. ',"started_at":' .. NOW_S .. '}')
  local now = call('HMGET', RUN, 'state', 'episode', 'phase')
  if now[1] == 'queued' then call('HSET', RUN, 'state', 'running') end
  local known = now[2] .. (now[3] or '')
  return {
    unit, fence, lo and k or -1, attempt,
    attempt - tonumber(counts[2] or 0), -- attempts in this episode
    tonumber(counts[3] or 0) - tonumber(counts[4] or 0), -- losses in this episode
    counts[5] and NOW - tonumber(counts[5]) or 0,
    counts[6] or '',
    NOW,
    goes_on and {} or inputs(step),
    how[3] == known and {} or meta(),
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
    local pool = not string.find(unit, '^[!^]') and graph((split(unit)))[1]
    if pool and inline ~= '' and #taken == 0 and (pool == inline or pool == '*') then
      taken = take(unit, how) or {}
    else
      if pool then call('ZADD', OUTBOX, NOW, unit) end
      publish[#publish + 1] = unit
    end
  end
  return { verdict, taken, publish }
end

local function how_at(i) return { tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2], ARGV[i + 3] }, ARGV[i + 4] end

local verbs = {}

local function set_deadline(timeout_ms)
  if timeout_ms <= 0 then return end
  call('HSET', RUN, 'deadline', int(NOW + timeout_ms))
  call('ZADD', TIMERS, NOW + timeout_ms, DEADLINE)
end

-- start: timeout_ms or 0, n, then n pairs (graph), m, then m roots, then field/value pairs of the run
function verbs.start()
  if call('EXISTS', RUN) == 1 then return { 'exists', call('HGET', RUN, 'state') } end
  local i = 3
  for _ = 1, tonumber(ARGV[i]) do
    call('HSET', GRAPH, ARGV[i + 1], ARGV[i + 2])
    i = i + 2
  end
  i = i + 1
  for _ = 1, tonumber(ARGV[i]) do
    i = i + 1
    call('HSET', STATES, ARGV[i], 'queued')
    call('ZADD', OUTBOX, NOW, ARGV[i])
  end
  call('HSET', RUN, 'created_at', NOW_S, 'episode', '1', 'phase', '', 'fence', '0', unpack(ARGV, i + 1))
  set_deadline(tonumber(ARGV[2]))
  return { 'started', 'queued' }
end

-- refuse: field/value pairs of the run. It has failed before its first step.
function verbs.refuse()
  if call('EXISTS', RUN) == 1 then return 0 end
  call('HSET', RUN, 'episode', '1', unpack(ARGV, 2))
  end_run('failed', '', call('HGET', RUN, 'error') or '', {})
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
    if not ENDED[call('HGET', STATES, step) or ''] then
      if not lo then
        if not call('HGET', STATES, unit) then return { 'early' } end
        -- no unit, but a field or an item that somebody has named in a message
        if unit ~= END and call('HEXISTS', GRAPH, unit) == 0 then return { 'early' } end
        -- expanded, or waiting for a nested run or for its time: others go on with it
        if call('HEXISTS', STATES, 'n:' .. unit) == 1 or call('HEXISTS', STATES, 'w:' .. unit) == 1 then
          return { 'done' }
        end
      end
      if lo and call('HEXISTS', UNITS, unit) == 0 then return { 'early' } end -- of an earlier episode
      if call('ZSCORE', TIMERS, unit) then return { 'done' } end
      -- Also when the lease has run out: the sweep, which knows whether it could be renewed, gives it up.
      if call('ZSCORE', LEASES, unit) and not took(unit, how) then return { 'held' } end
      local taken = take(unit, how)
      if taken then return { 'go', taken, {} } end
    end
  end
  return { 'done' }
end

local PUTS_OFF = { retrying = true, postponed = true, sleeping = true }

-- complete: unit, fence, index or -1, state, payload, tail, log, delay_ms, usage, lease_ms, record, known run, known
-- chunk, inline. State "waiting": the slot waits for the nested run whose id is the payload; "retrying", "postponed" and
-- "sleeping": for delay_ms.
function verbs.complete()
  local unit, fence, index, state, payload, tail, log, delay_ms, usage =
    ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9]), ARGV[10]
  local how, inline = how_at(11)
  local holder, k, hi = held(unit)
  if holder ~= fence then return { 'refused' } end
  local step, lo = split(unit)
  local slot = lo and (step .. '/' .. int(index)) or step
  if lo and k ~= index then return { 'done', lost_answer(how), {} } end
  use(step, usage)
  local ready = {}
  local now = call('HMGET', STATES, slot, 'n:' .. slot)
  local fresh = now[1] == 'running' and not now[2] -- a fan-out that was expanded is ended by its items
  local put_off_to
  if fresh then
    if log ~= '' then call('HSET', LOGS, slot .. '@' .. (1 + tonumber(call('HGET', ATTEMPTS, slot .. '#a') or 0)), log) end
    if PUTS_OFF[state] and is_to_stop(slot) then state = 'cancelled' end
    if state == 'waiting' then
      call('HSET', STATES, 'w:' .. slot, payload)
      if is_to_stop(slot) then chore('^cancel:' .. slot, ready) end
    elseif PUTS_OFF[state] then
      put_off_to = state
    else
      if payload ~= '' then call('HSET', OUTPUTS, slot, payload) end
      end_slot(step, lo and index or -1, state, tail, ready)
    end
  else
    -- Its lease was given up, and then it was cancelled.
    if state == 'waiting' and now[1] == 'cancelled' then ready[1] = '^cancel:' .. slot end
    if not lo then
      call('ZREM', LEASES, unit)
      return { 'done', lost_answer(how), ready }
    end
  end
  if lo then hold(unit, fence, index + 1, hi) end
  -- Last, for an item's own part may have the name of the one that it comes from.
  if put_off_to then put_off(step, lo and index or -1, state, tail, delay_ms) end
  if not lo or index + 1 >= hi then
    call('ZREM', LEASES, unit)
    return go_on(ready, inline, how, 'ok')
  end
  if inline == '' then -- draining: what was not begun goes back as it is
    call('ZREM', LEASES, unit)
    if first_open(step, index + 1, hi) < hi then ready[#ready + 1] = unit end
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
  call('ZREM', LEASES, step)
  if call('HGET', STATES, step) ~= 'running' then return { 'done', lost_answer(how), {} } end -- given up, and cancelled
  local ready = {}
  if is_to_stop(step) then
    end_slot(step, -1, 'cancelled', '', ready)
    return go_on(ready, '', how, 'ok')
  end
  call('HSET', STATES, 'n:' .. step, int(n))
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

-- resolve: step, index or -1, attempt, id of the nested run, state, payload, tail, delay_ms. The nested run of an
-- attempt of a slot has ended. State "retrying": another attempt, with a run of its own, begins in delay_ms.
function verbs.resolve()
  local step, index, attempt, child, state, payload, tail, delay_ms =
    ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
  local slot = slot_at(step, index)
  if call('HGET', STATES, slot) ~= 'running' or not is_in_flight() then return { 'done', {}, {} } end
  if attempt ~= 1 + tonumber(call('HGET', ATTEMPTS, slot .. '#a') or 0) then return { 'done', {}, {} } end
  call('ZREM', OUTBOX, '^await:' .. slot, '^cancel:' .. slot)
  local ready = {}
  if state == 'retrying' and not is_to_stop(slot) then
    call('HDEL', STATES, 'w:' .. slot)
    put_off(step, index, state, tail, delay_ms)
    return go_on(ready, '', {}, 'ok')
  end
  if is_to_stop(slot) and state ~= 'succeeded' then state = 'cancelled' end
  call('HSET', STATES, 'w:' .. slot, child)
  if payload ~= '' then call('HSET', OUTPUTS, slot, payload) end
  end_slot(step, index, state, tail, ready)
  return go_on(ready, '', {}, 'ok')
end

-- finish: fence, state, payload, error (JSON or ""). What the run comes to.
function verbs.finish()
  local fence, state, payload, problem = tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
  if held(END) ~= fence then return { 'refused' } end
  if ENDED[call('HGET', STATES, END) or ''] then return { 'done' } end
  call('HSET', STATES, END, 'succeeded')
  call('ZREM', LEASES, END)
  local ready = {}
  conclude(state, payload, problem, ready)
  return go_on(ready, '', {}, 'ok')
end

-- give_up: error (JSON). Ends a run that cannot go on; answers the chores that this makes.
function verbs.give_up()
  if not is_in_flight() then return {} end
  call('DEL', UNITS) -- so whoever still runs one is refused
  local ready = {}
  end_run('failed', '', ARGV[2], ready)
  return ready
end

-- clear: rows of the outbox that were dealt with. Answers how many are left.
function verbs.clear()
  for i = 2, #ARGV, 1000 do call('ZREM', OUTBOX, unpack(ARGV, i, math.min(i + 999, #ARGV))) end
  if is_in_flight() then call('HINCRBY', RUN, 'cleared', 1) end
  return call('ZCARD', OUTBOX)
end

-- Stop ----------------------------------------------------------------------------------------------------------

local function in_work() -- slots under a lease
  local found = {}
  for _, unit in ipairs(call('ZRANGE', LEASES, 0, -1)) do found[slot_of(unit)] = true end
  return found
end

local function stop_child(slot, ready) -- false unless it waits for a nested run, which is to be cancelled then
  local child = call('HGET', STATES, 'w:' .. slot)
  if not child or child == '~' then return false end
  chore('^cancel:' .. slot, ready)
  return true
end

local function stop_slot(step, slot, state, ready) -- the record of what was begun says so
  if state ~= 'running' then return end
  close_record(slot, 'cancelled', '')
  cancel_nested(step, slot, ready)
end

local function stop_items(step, n, busy, ready)
  local stopped = 0
  for i = 0, n - 1 do
    local slot = step .. '/' .. int(i)
    local state = call('HGET', STATES, slot) or ''
    if not ENDED[state] and not busy[slot] and not stop_child(slot, ready) then
      stop_slot(step, slot, state, ready)
      call('HSET', STATES, slot, 'cancelled')
      stopped = stopped + 1
    end
  end
  if call('HEXISTS', STATES, 'c:' .. step) == 1 then call('HSET', STATES, 'c:' .. step, int(n)) end
  call('HDEL', ITEMS, 'again:' .. step)
  if stopped > 0 then
    call('HINCRBY', STATES, 'x:' .. step, stopped)
    end_items(step, stopped, ready)
  end
end

-- What of this phase has not begun never will; what is in work is told to stop when its lease is renewed.
local function stop(cause, ready)
  call('HSET', RUN, 'stopping', cause)
  stopping = cause
  local busy = in_work()
  drop_units()
  call('DEL', TIMERS)
  local phase = call('HGET', RUN, 'phase') or ''
  if phase == '' and (tonumber(call('HGET', RUN, 'left')) or 0) == 0 then -- all but the run's output is there
    call('HDEL', UNITS, END)
    call('ZREM', LEASES, END)
    call('HSET', STATES, END, 'cancelled')
    end_phase(ready)
    return
  end
  for _, step in ipairs(steps_of(phase)) do
    local fields = call('HMGET', STATES, step, 'n:' .. step)
    local state = fields[1] or ''
    if not ENDED[state] then
      if fields[2] then
        stop_items(step, tonumber(fields[2]), busy, ready)
      elseif not busy[step] and not stop_child(step, ready) then
        stop_slot(step, step, state, ready)
        settle(step, 'cancelled', ready)
      end
    end
  end
end

-- cancel: the phase that is meant; a repeat must not stop the next one. Answers as complete; done: the run is not in
-- flight, in another phase, or being cancelled already.
function verbs.cancel()
  if not is_in_flight() or (call('HGET', RUN, 'phase') or '') ~= ARGV[2] then return { 'done', {}, {} } end
  if is_stopping() == 'cancelled' then return { 'done', {}, {} } end
  call('HSET', RUN, 'cancel_requested', NOW_S)
  local ready = {}
  if is_stopping() then
    call('HSET', RUN, 'stopping', 'cancelled') -- all is being stopped already: only what it is called changes
  else
    stop('cancelled', ready)
  end
  return go_on(ready, '', {}, 'ok')
end

local function forget_due(slot) -- what the slot waited for, and its message, will not come
  local step, index = string.match(slot, '^(.-)/(%d+)$')
  local unit = step and (step .. '/' .. index .. '-' .. int(tonumber(index) + 1)) or slot
  call('ZREM', TIMERS, unit, '~' .. slot)
  call('ZREM', OUTBOX, unit)
  if call('HGET', STATES, 'w:' .. slot) == '~' then call('HDEL', STATES, 'w:' .. slot) end
end

local function cancel_slot(slot, busy, ready) -- a step that was not expanded, or an item; it has not ended
  local state = call('HGET', STATES, slot)
  if busy[slot] or stop_child(slot, ready) then
    call('HSET', STATES, 's:' .. slot, '1')
    return
  end
  forget_due(slot)
  if state == 'running' then
    end_named(slot, 'cancelled', ready)
    return
  end
  local step, index = string.match(slot, '^(.-)/(%d+)$') -- not begun: there is no record of it to close
  if step then end_item(step, index, 'cancelled', ready) else settle(slot, 'cancelled', ready) end
end

-- cancel_step: slot, attempt that is meant or 0. Cancels one step, with its items or its nested run, or one item;
-- the rest of the run goes on. Verdicts: ok; done: it has ended, or is to stop already, or that attempt is over;
-- unknown: no such run; no_step, no_item, no_attempt; early: a hook whose time has not come, or items that are not there yet.
function verbs.cancel_step()
  local slot, attempt = ARGV[2], tonumber(ARGV[3])
  if call('EXISTS', RUN) == 0 then return { 'unknown' } end
  local step, index = string.match(slot, '^(.-)/(%d+)$')
  step, index = step or slot, tonumber(index)
  if step == END or call('HEXISTS', GRAPH, step) == 0 then return { 'no_step' } end
  local n = tonumber(call('HGET', STATES, 'n:' .. step))
  local state = call('HGET', STATES, slot) or ''
  if index then
    if not string.find(graph(step)[6], 'f') or (n and index >= n) then return { 'no_item' } end
    if not n then return { ENDED[call('HGET', STATES, step) or ''] and 'done' or 'early' } end
  end
  if not is_in_flight() or ENDED[state] or is_to_stop(slot) then return { 'done' } end
  if graph(step)[7] ~= (call('HGET', RUN, 'phase') or '') then return { 'early' } end
  local made = tonumber(call('HGET', ATTEMPTS, slot .. '#a') or 0)
  if call('HEXISTS', ATTEMPTS, slot .. '@' .. (made + 1)) == 1 then made = made + 1 end
  if attempt > 0 and attempt < made then return { 'done' } end
  if attempt > made + 1 then return { 'no_attempt' } end
  local ready, busy = {}, in_work()
  if index or not n then
    cancel_slot(slot, busy, ready)
  else
    call('HSET', STATES, 's:' .. step, '1')
    call('HDEL', ITEMS, 'again:' .. step)
    if call('HEXISTS', STATES, 'c:' .. step) == 1 then call('HSET', STATES, 'c:' .. step, int(n)) end
    for i = 0, n - 1 do
      local item = step .. '/' .. int(i)
      if not ENDED[call('HGET', STATES, item) or ''] then cancel_slot(item, busy, ready) end
    end
  end
  return go_on(ready, '', {}, 'ok')
end

-- fire: takes up what waited for its time, which has come. Answers {rows to publish, when the next is due or ""}.
function verbs.fire()
  if not is_in_flight() then
    call('DEL', TIMERS)
    return { {}, '' }
  end
  local ready = {}
  for _, member in ipairs(call('ZRANGEBYSCORE', TIMERS, '-inf', NOW, 'LIMIT', 0, 1000)) do
    if call('ZREM', TIMERS, member) == 1 then -- else the run has been stopped since
      local slot = string.match(member, '^~(.*)$')
      if member == DEADLINE then
        stop('timeout', ready)
      elseif slot then
        call('HDEL', STATES, 'w:' .. slot)
        end_named(slot, 'succeeded', ready)
      else
        call('HSET', STATES, slot_of(member), 'queued')
        ready[#ready + 1] = member
      end
    end
  end
  local next_ = call('ZRANGE', TIMERS, 0, 0, 'WITHSCORES')
  return { go_on(ready, '', {}, 'ok')[3], next_[2] or '' }
end

-- Rescue --------------------------------------------------------------------------------------------------------

-- Whoever ran this unit is gone: the loss is counted, and it is to be published again; unless all of it is to stop.
local function lose(unit, reason, ready)
  local slot = slot_of(unit)
  call('ZREM', LEASES, unit)
  local before = call('HGET', ATTEMPTS, slot .. '#x')
  local worker = string.match(last_record(slot), '"worker": "([^"]*)"')
  local loss = cjson.encode({ at = NOW, reason = reason, worker = worker })
  call('HSET', ATTEMPTS, slot .. '#x', before and (before .. ',' .. loss) or loss)
  call('HINCRBY', ATTEMPTS, slot .. '#l', 1)
  if slot ~= END and is_to_stop(slot) then
    if ENDED[call('HGET', STATES, slot) or ''] then return end -- its nested run was quicker than who began it
    local step, lo = split(unit)
    local _, k, hi = held(unit)
    end_named(slot, 'cancelled', ready)
    if lo and first_open(step, k + 1, hi) < hi then ready[#ready + 1] = unit end -- only this item was cancelled
  else
    ready[#ready + 1] = unit
  end
end

-- What of a run changes whenever something is taken or published, and the plan; '' unless it is in flight with nothing
-- in the outbox and nothing in work: then all that goes on with it is messages and timers.
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
  if call('ZCOUNT', TIMERS, '-inf', NOW - 1000) > 0 then return 1 end
  local version = idle()
  return version == '' and 0 or version
end

-- sweep: age_ms, whether to give up leases that ran out ("1" or ""). Answers {state, rows to publish again, how many
-- units were lost, rows left in the outbox}.
function verbs.sweep()
  local state = call('HGET', RUN, 'state')
  if not state then return { '', {}, 0, 0 } end
  local again = call('ZRANGEBYSCORE', OUTBOX, '-inf', NOW - tonumber(ARGV[2]), 'LIMIT', 0, 500)
  for _, unit in ipairs(again) do call('ZADD', OUTBOX, 'XX', NOW, unit) end
  local lost = ARGV[3] == '1' and call('ZRANGEBYSCORE', LEASES, '-inf', NOW, 'LIMIT', 0, 500) or {}
  local ready = {}
  for _, unit in ipairs(lost) do lose(unit, 'its lease ran out', ready) end
  for _, unit in ipairs(go_on(ready, '', {}, 'ok')[3]) do again[#again + 1] = unit end
  return { call('HGET', RUN, 'state'), again, #lost, call('ZCARD', OUTBOX) }
end

-- limbo: what `look` has said. Answers {the units that only a message can bring on, 1 if there are none and nothing but
-- time brings the run on}; nothing if it has moved since.
function verbs.limbo()
  if idle() ~= ARGV[2] then return { {}, 0 } end
  local states, found, nested = {}, {}, false
  local flat = call('HGETALL', STATES)
  for i = 1, #flat, 2 do
    states[flat[i]] = flat[i + 1]
    nested = nested or (string.sub(flat[i], 1, 2) == 'w:' and flat[i + 1] ~= '~')
  end
  for slot, state in pairs(states) do
    if (state == 'queued' or state == 'running') and not string.find(slot, '[:/]')
      and not states['n:' .. slot] and not states['w:' .. slot] then
      found[#found + 1] = slot
    end
  end
  for _, unit in ipairs(call('HKEYS', UNITS)) do
    local step, lo = split(unit)
    if lo and not ENDED[states[step] or ''] and not call('ZSCORE', TIMERS, unit) then
      local _, k, hi = held(unit)
      while k < hi do
        local slot = step .. '/' .. int(k)
        if not ENDED[states[slot] or ''] and states[slot] ~= 'retrying' and not states['w:' .. slot] then break end
        k = k + 1
      end
      if k < hi then found[#found + 1] = unit end
    end
  end
  return { found, #found == 0 and not nested and call('EXISTS', TIMERS) or 0 }
end

local function is_begun(unit) -- and neither ended nor handed on, to its items, to a nested run or to its time
  local slot = slot_of(unit)
  local fields = call('HMGET', STATES, slot, 'n:' .. slot, 'w:' .. slot)
  return fields[1] == 'running' and not fields[2] and not fields[3]
end

-- renew: lease_ms, then pairs (unit, fence). Answers {units that are no longer the caller's, units that are to stop}.
-- A lease that was given up is the caller's again if nobody has taken over.
function verbs.renew()
  local gone, to_stop = {}, {}
  for i = 3, #ARGV, 2 do
    local unit = ARGV[i]
    if held(unit) ~= tonumber(ARGV[i + 1]) then
      gone[#gone + 1] = unit
    elseif call('ZSCORE', LEASES, unit) or is_begun(unit) then
      call('ZADD', LEASES, NOW + tonumber(ARGV[2]), unit)
      call('ZREM', OUTBOX, unit)
      if unit ~= END and is_to_stop(slot_of(unit)) then to_stop[#to_stop + 1] = unit end
    elseif call('HGET', STATES, slot_of(unit)) == 'cancelled' then -- its lease had been given up by then
      to_stop[#to_stop + 1] = unit
    end
  end
  return { gone, to_stop }
end

-- abandon: the opening of the records of a process that has died, how it died. Answers {the units that it had taken,
-- rows to publish}.
function verbs.abandon()
  local lost, ready = {}, {}
  for _, unit in ipairs(call('ZRANGE', LEASES, 0, -1)) do
    if took(unit, { 0, ARGV[2] }) then
      lost[#lost + 1] = unit
      lose(unit, ARGV[3], ready)
    end
  end
  return { lost, go_on(ready, '', {}, 'ok')[3] }
end

-- give_back: unit, fence, items per part. The items after the one in work go back, as new parts.
function verbs.give_back()
  local unit, size = ARGV[2], tonumber(ARGV[4])
  local fence, k, hi = held(unit)
  local step = split(unit)
  if fence ~= tonumber(ARGV[3]) or k + 1 >= hi or ENDED[call('HGET', STATES, step .. '/' .. int(k + 1)) or ''] then
    return {} -- not its own, nothing left, or all of it cancelled
  end
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

-- A further episode ---------------------------------------------------------------------------------------------

local function new_budget(slot) -- attempts and losses are counted anew; what was recorded stays
  local counts = call('HMGET', ATTEMPTS, slot .. '#a', slot .. '#l')
  local retries = tonumber(counts[1] or 0)
  if call('HEXISTS', ATTEMPTS, slot .. '@' .. (retries + 1)) == 1 then retries = retries + 1 end
  call('HSET', ATTEMPTS, slot .. '#a', int(retries), slot .. '#b', int(retries), slot .. '#k', counts[2] or '0')
  call('HDEL', ATTEMPTS, slot .. '#u', slot .. '#m')
  call('HDEL', STATES, 's:' .. slot)
end

local function forget(step) -- as if it had never begun
  local n = tonumber(call('HGET', STATES, 'n:' .. step) or 0)
  for i = 0, n - 1 do
    local slot = step .. '/' .. int(i)
    new_budget(slot)
    call('HDEL', STATES, slot, 'w:' .. slot)
    call('HDEL', OUTPUTS, slot)
  end
  new_budget(step)
  for _, field in ipairs({ '', 'w:', 'n:', 'd:', 'b:', 'c:', 'x:', 'u:', 'f:', 'k:' }) do
    call('HDEL', STATES, field .. step)
  end
  call('HDEL', OUTPUTS, step)
  call('HDEL', ITEMS, 'per:' .. step, 'again:' .. step)
end

-- So long who reopens a run has for the nested ones, and again whenever it says that it is still at it (verbs.hold_back).
local AWAIT_MS = 8000

local function wait_again(slot, child) -- for a nested run that goes on
  new_budget(slot)
  call('HSET', STATES, slot, 'running', 'w:' .. slot, child)
  call('ZADD', OUTBOX, NOW + AWAIT_MS, '^await:' .. slot)
end

local function reopen_items(step, how, ready) -- how: {items: [index], waits: {index: child}, parallel}
  local n = tonumber(call('HGET', STATES, 'n:' .. step))
  local again, count = {}, 0
  for _, i in ipairs(how.items) do
    local slot = step .. '/' .. int(i)
    new_budget(slot)
    call('HDEL', STATES, 'w:' .. slot)
    call('HSET', STATES, slot, 'queued')
    count = count + 1
    if how.parallel > 0 and count > how.parallel then
      again[#again + 1] = int(i) .. ','
    else
      ready[#ready + 1] = new_part(step, i, i + 1)
    end
  end
  for i, child in pairs(how.waits) do wait_again(step .. '/' .. i, child) end
  call('HDEL', STATES, 'b:' .. step, 'x:' .. step)
  if how.parallel > 0 then
    call('HSET', STATES, 'c:' .. step, int(n))
    call('HSET', ITEMS, 'again:' .. step, table.concat(again))
  end
  local ended = 0
  for _, state in ipairs(many(STATES, step .. '/', n)) do
    if ENDED[state] then ended = ended + 1 end
    if state == 'failed' then call('HINCRBY', STATES, 'b:' .. step, 1) end
    if state == 'cancelled' then call('HINCRBY', STATES, 'x:' .. step, 1) end
  end
  call('HSET', STATES, 'd:' .. step, int(ended), step, 'running')
end

local function recount() -- what has ended, for the joins below it; answers how many main steps have not
  local steps = steps_of('')
  for _, step in ipairs(steps) do call('HDEL', STATES, 'u:' .. step, 'f:' .. step, 'k:' .. step) end
  local left = 0
  call('HDEL', RUN, 'bad')
  for _, step in ipairs(steps) do
    local state = call('HGET', STATES, step) or ''
    if ENDED[state] then note(step, state) else left = left + 1 end
  end
  return left
end

-- reopen: the episode that has ended, JSON {plan, input, graph or null, reset: [step], gone: [step], items: {step: how},
-- waits: {step: child}, mended: {slot: payload}, failed: [slot that is a dead letter no longer], timeout_ms, parent or
-- null}, id of the request. Opens the next episode of a run in which the steps of `reset`, and items, run again; they
-- have to be closed under "is downstream of".
function verbs.reopen()
  local fields = call('HMGET', RUN, 'state', 'episode')
  if not fields[1] then return { 'unknown' } end
  if is_in_flight() then
    if call('HGET', RUN, 'reopen_id') == ARGV[4] then -- the answer was lost
      return { 'ok', {}, call('ZRANGEBYSCORE', OUTBOX, '-inf', NOW) }
    end
    return { 'in_flight' }
  end
  if fields[2] ~= ARGV[2] then return { 'changed' } end
  local how = cjson.decode(ARGV[3])
  for _, key in ipairs(KEYS) do call('PERSIST', key) end
  call('HDEL', RUN, 'finished_at', 'output', 'error', 'end_state', 'end_output', 'end_error', 'hook_failed', 'stopping',
    'cancel_requested', 'deadline')
  call('HSET', RUN, 'state', 'running', 'phase', '', 'episode', int(tonumber(fields[2]) + 1),
    'plan', how.plan, 'input', how.input, 'reopen_id', ARGV[4])
  if how.hooks then call('HSET', RUN, 'hooks', '1') end
  if how.parent ~= cjson.null then call('HSET', RUN, 'parent', how.parent) end
  call('DEL', TIMERS, UNITS)
  set_deadline(tonumber(how.timeout_ms))
  for _, step in ipairs(how.gone) do forget(step) end
  for _, phase in ipairs({ 'on_failure', 'finally' }) do
    for _, step in ipairs(steps_of(phase)) do forget(step) end
  end
  call('HDEL', STATES, END)
  if how.graph ~= cjson.null then
    call('DEL', GRAPH)
    rows = {}
    for step, row in pairs(how.graph) do call('HSET', GRAPH, step, row) end
  end
  local ready = {}
  for _, step in ipairs(how.reset) do forget(step) end
  for step, child in pairs(how.waits) do wait_again(step, child) end
  for step, items in pairs(how.items) do
    new_budget(step)
    reopen_items(step, items, ready)
  end
  for slot, payload in pairs(how.mended) do call('HSET', ATTEMPTS, slot .. '#m', payload) end
  for _, slot in ipairs(how.failed) do chore('!' .. slot, ready) end
  call('HSET', RUN, 'left', int(recount()))
  if call('HGET', RUN, 'left') == '0' then
    end_phase(ready)
  else
    for _, step in ipairs(how.reset) do
      if graph(step)[3] == 0 then
        call('HSET', STATES, step, 'queued')
        ready[#ready + 1] = step
      else
        local undone = decide(step, ready)
        if undone then settle(step, undone, ready) end
      end
    end
  end
  return go_on(ready, '', {}, 'ok')
end

-- hold_back: rows of the outbox that are still to be left to who reopened the run.
function verbs.hold_back()
  for i = 2, #ARGV do call('ZADD', OUTBOX, 'XX', NOW + AWAIT_MS, ARGV[i]) end
end

local answer = verbs[ARGV[1]]()
if ends then
  local failed = call('HGET', RUN, 'state') == 'failed' or call('HEXISTS', RUN, 'bad') == 1 -- so it has dead letters
  local keep = failed and KEEP_FAILED or KEEP
  for _, key in ipairs(KEYS) do call('EXPIRE', key, keep) end
end
return answer
