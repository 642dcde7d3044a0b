-- The store of `limits.store`, inside Redis or Valkey: one call, one step, on the server's clock.
-- The arithmetic is that of limits/bucket.py, line for line; comments there.
-- KEYS[1]: prefix, in braces, so that all keys lie on one node of a cluster.
-- ARGV[1]: operation; ARGV[2]: its arguments, packed.

local SLOT, GRACE, HORIZON, SETBACK, EPSILON = 1, 5, 600, 10, 1e-6
local prefix, op, args = KEYS[1], ARGV[1], cmsgpack.unpack(ARGV[2])
local time = redis.call('TIME')
local now = args.now or (time[1] + time[2] / 1e6)
local leases = prefix .. ':leases'

local function ordered(map)
  local keys = {}
  for key in pairs(map) do keys[#keys + 1] = key end
  table.sort(keys)
  return keys
end

local function fill(a, b, at)
  if at > a.at then
    a.level = math.min(b.burst, a.level + b.rate * (at - a.at))
    a.at = at
  end
end

local function give(a, b, units)
  a.level = math.min(b.burst, a.level + units)
end

local function advance(a, b)
  if now < a.at - SETBACK then
    a.at = now
    for _, map in ipairs({a.slots, a.held}) do
      for _, slot in ipairs(ordered(map)) do
        if slot > (now + HORIZON) / SLOT then map[slot] = nil end
      end
    end
  end
  for _, slot in ipairs(ordered(a.slots)) do
    if slot * SLOT > now then break end
    fill(a, b, slot * SLOT)
    a.level = a.level - a.slots[slot]
    a.held[slot] = (a.held[slot] or 0) + a.slots[slot]
    a.slots[slot] = nil
  end
  fill(a, b, now)
  for _, slot in ipairs(ordered(a.held)) do
    if (slot + 1) * SLOT + GRACE <= now then
      give(a, b, a.held[slot])
      a.held[slot] = nil
    end
  end
end

local function fits(a, b, units)
  if units <= 0 then return true end
  local level, at = a.level - units, a.at
  if level < -EPSILON then return false end
  for _, slot in ipairs(ordered(a.slots)) do
    level = math.min(b.burst, level + b.rate * (slot * SLOT - at)) - a.slots[slot]
    if level < -EPSILON then return false end
    at = slot * SLOT
  end
  return true
end

local function earliest(a, b, units, from)
  local order, needs = ordered(a.slots), {}
  for i = #order, 1, -1 do
    needs[i] = a.slots[order[i]]
    if i < #order then
      local filled = b.rate * SLOT * (order[i + 1] - order[i])
      needs[i] = needs[i] + math.max(0, needs[i + 1] - filled)
    end
  end
  local level, at = a.level, a.at
  for i = 1, #order + 1 do
    local last = i > #order
    local stop = last and math.huge or order[i] * SLOT
    local full = at + math.max(0, units - level) / b.rate
    local slot = math.max(from, math.ceil(full / SLOT - EPSILON))
    local start = slot * SLOT
    if start < stop then
      local left = math.min(b.burst, level + b.rate * (start - at)) - units
      if left >= -EPSILON and (last
          or math.min(b.burst, left + b.rate * (stop - start)) >= needs[i] - EPSILON) then
        return slot
      end
    end
    if not last then
      level, at = math.min(b.burst, level + b.rate * (stop - at)) - a.slots[order[i]], stop
    end
  end
end

local accounts = {}

local function open(b)
  if not accounts[b.name] then
    local packed = redis.call('GET', prefix .. ':b:' .. b.name)
    local a = packed and cmsgpack.unpack(packed)
      or {level = b.burst, at = now, slots = {}, held = {}}
    advance(a, b)
    accounts[b.name] = {a = a, b = b}
  end
  return accounts[b.name].a
end

local function save()
  for name, entry in pairs(accounts) do
    local a, b = entry.a, entry.b
    local ends = now + (b.burst - a.level) / b.rate
    for _, map in ipairs({a.slots, a.held}) do
      for slot in pairs(map) do ends = math.max(ends, (slot + 1) * SLOT + GRACE) end
    end
    local kept = math.ceil((ends - now + 60) * 1000)
    redis.call('SET', prefix .. ':b:' .. name, cmsgpack.pack(a), 'PX', string.format('%d', kept))
  end
end

local function answer(units, culprit, retry, promised)
  local levels = {}
  for i, b in ipairs(args.buckets) do levels[i] = open(b).level end
  save()
  return cmsgpack.pack({
    granted = culprit == nil, units = units, levels = levels,
    culprit = (culprit or 0) - 1, retry_after_s = retry or 0, promised = promised or false,
  })
end

local function record(id) return prefix .. ':r:' .. id end

local function keep(id, reservation)
  local kept = string.format('%d', math.ceil(args.lease * 1000) + 3600000)
  redis.call('SET', record(id), cmsgpack.pack(reservation), 'PX', kept)
  redis.call('ZADD', leases, string.format('%.17g', now + args.lease), id)
end

local function reservation_of(id)
  local packed = redis.call('GET', record(id))
  return packed and cmsgpack.unpack(packed)
end

local function settle(id, used)
  local reservation = reservation_of(id)
  redis.call('ZREM', leases, id)
  if not reservation then return end
  redis.call('DEL', record(id))
  used = used or reservation.used
  for i, b in ipairs(reservation.buckets) do
    give(open(b), b, reservation.units[i] - used[i])
  end
end

local function reserve(units)
  local used = {}
  for i, b in ipairs(args.buckets) do used[i] = b.counts and units[i] or 0 end
  keep(args.id, {buckets = args.buckets, units = units, used = used})
  return answer(units)
end

local function nothing()
  local zeros = {}
  for i in ipairs(args.buckets) do zeros[i] = 0 end
  return zeros
end

local function promise(culprit)
  local tickets = prefix .. ':t:' .. args.fingerprint
  local first = redis.call('ZRANGE', tickets, 0, 0, 'WITHSCORES')
  if args.again and first[2] then
    return answer(nothing(), culprit, math.max(0, first[2] * SLOT - now), true)
  end
  local slot, before = math.floor(now / SLOT) + 1, nil
  repeat
    before = slot
    for i, b in ipairs(args.buckets) do
      if args.units[i] > 0 then slot = earliest(open(b), b, args.units[i], slot) end
    end
  until slot == before or slot * SLOT - now > HORIZON
  local shared = open(args.buckets[culprit]).slots[slot] or 0
  local room = math.max(args.buckets[culprit].rate * SLOT, shared + args.units[culprit])
  local retry = (slot + shared / room) * SLOT - now
  if retry > HORIZON then return answer(nothing(), culprit, retry, false) end
  for i, b in ipairs(args.buckets) do
    local a = open(b)
    a.slots[slot] = (a.slots[slot] or 0) + args.units[i]
  end
  redis.call('ZADD', tickets, slot, cmsgpack.pack({units = args.units, id = args.id}))
  redis.call('EXPIRE', tickets, HORIZON + 60)
  return answer(nothing(), culprit, retry, true)
end

local function impossible()
  for i, b in ipairs(args.buckets) do
    if args.units[i] > b.burst then return i end
  end
end

local function refusing(units)
  for i, b in ipairs(args.buckets) do
    if not fits(open(b), b, units[i]) then return i end
  end
end

local function take()
  local known = reservation_of(args.id)
  if known then return answer(known.units) end
  if impossible() then return answer(nothing(), impossible(), math.huge) end
  local tickets = prefix .. ':t:' .. args.fingerprint
  redis.call('ZREMRANGEBYSCORE', tickets, '-inf', string.format('%.17g', (now - GRACE) / SLOT - 1))
  local first = redis.call('ZRANGE', tickets, 0, 0, 'WITHSCORES')
  if first[1] and first[2] * SLOT <= now then
    local slot, units = tonumber(first[2]), cmsgpack.unpack(first[1]).units
    if #units == #args.units then
      redis.call('ZREM', tickets, first[1])
      for i, b in ipairs(args.buckets) do
        local held = open(b).held
        local left = (held[slot] or 0) - units[i]
        held[slot] = left > EPSILON and left or nil
      end
      return reserve(units)
    end
  end
  local culprit = refusing(args.units)
  if culprit then return promise(culprit) end
  for i, b in ipairs(args.buckets) do open(b).level = open(b).level - args.units[i] end
  return reserve(args.units)
end

local function change()
  local reservation = reservation_of(args.id)
  if not reservation then return take() end
  local more = {}
  for i, units in ipairs(args.units) do more[i] = units - reservation.units[i] end
  local never = impossible()
  local culprit = never or refusing(more)
  if culprit then
    settle(args.id, nothing())
    if never then return answer(nothing(), never, math.huge) end
    return promise(culprit)
  end
  for i, b in ipairs(args.buckets) do give(open(b), b, -more[i]) end
  reservation.units = args.units
  keep(args.id, reservation)
  return answer(args.units)
end

local function renew()
  for id, used in pairs(args.used) do
    local reservation = reservation_of(id)
    if reservation then
      for i, b in ipairs(reservation.buckets) do
        local over = used[i] - reservation.units[i]
        if over > 0 then
          local a = open(b)
          a.level = a.level - over
          reservation.units[i] = used[i]
        end
      end
      reservation.used = used
      keep(id, reservation)
    end
  end
  save()
end

if op == 'renew' then return renew() end
if op == 'settle' then
  settle(args.id, args.used)
  return save()
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 8)) do
  settle(id)
end
if op == 'take' then return take() end
return change()
