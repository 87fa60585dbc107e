import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { dirname, join } from 'node:path'
import { Readable } from 'node:stream'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from '@jest/globals'
import { formatToken, parseToken } from '../core/pairing/index.ts'
import { agentStatus, nowUnixMs, pluginStatus, point, retention, scrub, secretToken, startFakeDaemons } from './testing/fake-daemons.ts'
import type { FakeDaemons } from './testing/fake-daemons.ts'
import { runCli } from './run.ts'

let daemons: FakeDaemons
beforeAll(async () => {
  daemons = await startFakeDaemons()
  daemons.pluginEvents.append({ level: 'warn', kind: 'capture.lost', message: 'the job ended\x1b[2J', context: { vmId: 101 } })
  daemons.agentEvents.append({ level: 'info', kind: 'checkpoint.valid', message: 'checkpoint 41 is valid' })
})
afterAll(() => daemons[Symbol.asyncDispose]())
beforeEach(() => void daemons.requests.splice(0))

type Outcome = { exitCode: number; out: string; err: string }
const run = async (
  argv: string[],
  options: { stdin?: string; env?: Record<string, string>; color?: boolean; signal?: AbortSignal; onOut?: (text: string) => void } = {},
): Promise<Outcome> => {
  let out = ''
  let err = ''
  const exitCode = await runCli(argv, {
    stdin: Readable.from(options.stdin === undefined ? [] : [options.stdin]),
    stdout: { write: (text) => ((out += text), options.onOut?.(text)) },
    stderr: { write: (text) => (err += text) },
    env: options.env ?? { PVECDP_PLUGIN_SOCKET: daemons.pluginSocket, PVECDP_AGENT_SOCKET: daemons.agentSocket },
    nowUnixMs: () => nowUnixMs,
    color: options.color ?? false,
    signal: options.signal ?? new AbortController().signal,
  })
  return { exitCode, out, err }
}
const json = async (argv: string[], options: { stdin?: string } = {}): Promise<unknown> => {
  const { exitCode, out, err } = await run([...argv, '--json'], options)
  expect(err).toBe('')
  expect(exitCode).toBe(0)
  expect(out.trimEnd().split('\n')).toHaveLength(1)
  return JSON.parse(out)
}
const human = async (argv: string[], options: { stdin?: string } = {}): Promise<string> => {
  const { exitCode, out, err } = await run(argv, options)
  expect({ exitCode, err }).toEqual({ exitCode: 0, err: '' })
  // eslint-disable-next-line no-control-regex
  expect(out).not.toMatch(/[\x00-\x09\x0b-\x1f]/)
  return out
}

describe('each command, for people and as JSON', () => {
  test('status shows both sides: state and reason per VM, RPO, sync progress', async () => {
    const text = await human(['status'])
    for (const part of [
      'Recovery site  connected, dr.example port 7402',
      'VPG web  degraded: VM 102 is behind',
      'RPO 3.2 s, a checkpoint every 5 s, last one 41',
      '2 abandoned',
      'VM 102: initial sync, 16 GiB of 32 GiB (50 %), 128 MiB/s, about 2 min 8 s left',
      '42 us / 180 us / 2.1 ms',
      'scsi0 32 GiB, virtio1 1 GiB',
      'RPO unknown, 812 checkpoints',
      'incomplete',
    ]) {
      expect(text).toContain(part)
    }
    expect(await json(['status'])).toEqual({ plugin: pluginStatus, agent: agentStatus, errors: {} })
  })

  test('status of one VPG, and of one nobody has', async () => {
    expect(await human(['status', 'db'])).not.toContain('web')
    expect(await json(['status', 'web'])).toMatchObject({ plugin: { vpgs: [{ name: 'web' }] }, agent: { vpgs: [{ name: 'web' }] } })
    expect(await run(['status', 'nope'])).toMatchObject({ exitCode: 1, err: 'error: there is no VPG nope\nhint: See what there is with: pvecdp status\n' })
  })

  test('an unknown RPO is marked, never green', async () => {
    const { out } = await run(['status'], { color: true })
    expect(out).toContain('\x1b[31munknown')
    expect(out).toContain('\x1b[32m3.2 s')
  })

  test('vpg create, list, delete', async () => {
    expect(await human(['vpg', 'create', 'mail', '--vm', '101', '102', '--checkpoint-every', '1s'])).toContain(
      'VPG mail protects VM 101, 102; it is initializing: attaching',
    )
    expect(daemons.requests).toEqual([
      { operation: 'createVpg', request: { params: undefined, query: undefined, body: { name: 'mail', vmIds: [101, 102], checkpointEveryMs: 1000, priority: 'normal' } } },
    ])
    expect(await json(['vpg', 'create', 'mail', '--vm', '101', '--vm', '102'])).toMatchObject({ name: 'mail', state: 'initializing' })
    expect(daemons.requests[1]).toMatchObject({ request: { body: { vmIds: [101, 102], checkpointEveryMs: 5000, priority: 'normal' } } })
    expect(await human(['vpg', 'list'])).toMatch(
      /^VPG +STATE +RPO +EVERY +VMS +REASON\nweb +degraded +3\.2 s +5 s +101 102 +VM 102.*\ndb +initializing +unknown +5 s +attaching\n$/,
    )
    expect(await json(['vpg', 'list'])).toEqual({ vpgs: pluginStatus.vpgs })
    expect(await human(['vpg', 'delete', 'web'])).toContain('no longer protected')
    expect(await json(['vpg', 'delete', 'web'])).toEqual({ deleted: 'web' })
  })

  test('vm suspend and resume', async () => {
    const text = await human(['vm', 'suspend', '101', '--owner', 'qm', '--reason', 'resize of scsi0'])
    expect(text).toMatch(/^VM 101 is suspended: held by qm: resize of scsi0\n {2}held suspended by qm \(resize of scsi0\) until 2026-11-23T\d\d:10:00.*\nLet go of it with: pvecdp vm resume 101 --owner qm\n$/)
    expect(daemons.requests).toMatchObject([{ operation: 'suspendVm', request: { params: { vmId: '101' }, body: { owner: 'qm', reason: 'resize of scsi0', forMs: 600_000 } } }])
    expect(await json(['vm', 'suspend', '101', '--owner', 'qm', '--reason', 'x', '--for', '30s'])).toMatchObject({ holds: [{ untilUnixMs: nowUnixMs + 30_000 }] })
    expect(await human(['vm', 'resume', '101', '--owner', 'qm'])).toBe('VM 101 is attaching: suspended, held by qm: resize\n')
    expect(await human(['vm', 'resume', '101', '--owner', 'ann'])).toContain('ann held nothing.')
    expect(await run(['vm', 'suspend', '102', '--owner', 'qm', '--reason', 'x'])).toMatchObject({ exitCode: 1, err: 'error: a backup runs on it\nhint: Wait until that operation has ended.\n' })
    for (const wrong of [['--reason', 'x'], ['--owner', 'a b', '--reason', 'x'], ['--owner', 'a', '--reason', ''], ['--owner', 'a', '--reason', 'x', '--for', '2d']]) {
      expect((await run(['vm', 'suspend', '101', ...wrong])).exitCode).toBe(2)
    }
  })

  test('checkpoint list and tag', async () => {
    const text = await human(['checkpoint', 'list', 'web', '--limit', '2', '--from', '1h-ago', '--to', 'now'])
    const [head, first, second] = text.split('\n')
    expect(head).toMatch(/^CHECKPOINT +TIME +AGE +STATE +KIND +TAG$/)
    expect(first).toMatch(/^41 +2026-11-23T\d\d:\d\d:56\.800[+-]\d\d:\d\d +3\.2 s ago +proved +tagged +before +\[2J upgrade$/)
    expect(second).toMatch(/^40 .*suspect +automatic$/)
    expect(daemons.requests[0]).toMatchObject({
      request: { params: { name: 'web' }, query: { limit: 2, fromUnixMs: nowUnixMs - 3_600_000, toUnixMs: nowUnixMs } },
    })
    expect(await json(['checkpoint', 'list', 'web'])).toMatchObject({ checkpoints: [{ id: '41' }, { id: '40' }] })
    expect(await human(['checkpoint', 'tag', 'web', 'before upgrade'])).toContain('is tagged "before upgrade"; it is pending until')
    expect(await json(['checkpoint', 'tag', 'web', 'x'])).toEqual({ checkpointId: '42', atUnixMs: nowUnixMs, state: 'pending' })
  })

  test('sync force and verify, of a group and of one VM', async () => {
    expect(await human(['sync', 'force', 'web'])).toBe('VM 101, 102 of VPG web are compared with the recovery site.\nWatch it with: pvecdp status web\n')
    expect(await json(['sync', 'force', 'web', '--vm', '102'])).toEqual({ vmIds: [102] })
    expect(await human(['verify', 'web', '--vm', '101'])).toContain('VM 101 of VPG web is being verified.')
    expect(await json(['verify', 'web'])).toEqual({ vmIds: [101, 102] })
    expect(daemons.requests.map(({ operation, request }) => [operation, (request as { body: unknown }).body])).toEqual([
      ['forceSync', {}], ['forceSync', { vmId: 102 }], ['verify', { vmId: 101 }], ['verify', {}],
    ])
    expect((await run(['verify', 'nope'])).exitCode).toBe(1)
  })

  test('point open, list, close', async () => {
    const text = await human(['point', 'open', 'web', 'latest'])
    expect(text).toContain('nbd+unix:///p-1-101-scsi0?socket=/run/pve-cdp/points.sock')
    expect(text).toContain('Close it with: pvecdp point close p-1')
    expect(await json(['point', 'open', 'web', '10m-ago'])).toEqual(point)
    await json(['point', 'open', 'web', '41'])
    expect(daemons.requests.map(({ request }) => (request as { body: { checkpoint: unknown } }).body.checkpoint)).toEqual([
      'latest',
      { atUnixMs: nowUnixMs - 600_000 },
      '41',
    ])
    expect(await human(['point', 'list'])).toContain('Recovery point p-1: VPG web at 2026-11-23T')
    expect(await json(['point', 'list'])).toEqual({ points: [point] })
    expect(await human(['point', 'close', 'p-1'])).toBe('Recovery point p-1 is closed.\n')
    expect(await json(['point', 'close', 'p-1'])).toEqual({ closed: 'p-1' })
  })

  test('scrub begins one, of all VMs or one, and show says what was found and which checkpoints need it', async () => {
    expect(await human(['scrub'])).toContain('VM 101, 102 are being scrubbed')
    expect(await human(['scrub', '102'])).toContain('VM 102 is being scrubbed')
    expect(daemons.requests.filter(({ operation }) => operation === 'startScrub').map(({ request }) => request)).toMatchObject([{ body: {} }, { body: { vmId: 102 } }])
    const text = await human(['scrub', 'show'])
    expect(text).toContain('Every 7 d, at most 16 MiB/s.')
    expect(text).toContain('1 of 2 open')
    expect(text).toContain('damaged, written again since: records 12 to 14')
    expect(text).toContain('3 checkpoints of VPG web need what is damaged')
    expect(text).toContain('VM 102: nobody knows')
    expect(text).not.toContain('\x1b[2J')
    expect(await json(['scrub', 'show'])).toEqual(scrub)
  })

  test('replica list shows what is left over, and delete wants the name twice', async () => {
    const text = await human(['replica', 'list'])
    expect(text).toContain('103')
    expect(text).toContain('left')
    expect(text).toContain('recovery point p-1')
    expect(await human(['replica', 'delete', '103', '--confirm', '103', '--with-checkpoints'])).toContain('The replica of VM 103 is deleted, and 4 checkpoints with it.')
    expect(daemons.requests.at(-1)).toMatchObject({ operation: 'deleteReplica', request: { body: { vmId: 103, confirm: '103', withCheckpoints: true } } })
  })

  test('retention set chooses what becomes of a sync that does not fit, and refuses what is no choice', async () => {
    expect(await human(['retention', 'set', 'web', '--sync-overflow', 'give-up'])).toContain('down to a last tagged checkpoint (give-up)')
    expect(daemons.requests.at(-1)).toMatchObject({ operation: 'setRetention', request: { params: { name: 'web' }, body: { syncOverflow: 'give-up' } } })
    expect(await human(['retention', 'show', 'web'])).toContain('up to the hard stop (grow)')
  })

  test('retention show says from when to when, what limits it, and what is wrong', async () => {
    const text = await human(['retention', 'show', 'web'])
    expect(text).toContain('VPG web can be recovered from 2026-11-22T')
    expect(text).toContain('History is 10 h of 1 d: something that is open holds it longer; at most 32 GiB a VM, hard stop at 48 GiB.')
    expect(text).toContain('Promoting VM 101 to 2026-11-22T')
    expect(text).toContain('Held by recovery point p-1 (VM 101) since 2026-11-23T')
    expect(text).toContain('error retention.over-limit: the journal of VM 101 is above its limit; a pin holds it, since')
    expect(text).toMatch(/101 +33 GiB +open/)
    expect(await json(['retention', 'show', 'web'])).toEqual(retention)
  })

  test('events of both sides, by time, and of one', async () => {
    expect((await human(['events'])).split('\n').map((line) => line.replace(/^\S+ /, ''))).toEqual([
      'plugin warn  capture.lost: the job ended [2J vmId=101',
      'agent  info  checkpoint.valid: checkpoint 41 is valid',
      '',
    ])
    const { out } = await run(['events', '--json'])
    expect(
      out
        .trimEnd()
        .split('\n')
        .map((line) => JSON.parse(line) as unknown),
    ).toMatchObject([
      { side: 'plugin', kind: 'capture.lost', seq: 1 },
      { side: 'agent', kind: 'checkpoint.valid' },
    ])
    expect(await json(['events', '--side', 'agent'])).toMatchObject({ kind: 'checkpoint.valid' })
  })

  test('events --follow goes on until it is interrupted', async () => {
    const interrupt = new AbortController()
    const shown: string[] = []
    const first = Promise.withResolvers<void>()
    const running = run(['events', '--follow', '--limit', '1', '--json'], {
      signal: interrupt.signal,
      onOut: (text) => {
        shown.push(text)
        if (shown.length === 2) first.resolve()
        if (text.includes('later')) interrupt.abort()
      },
    })
    await first.promise
    daemons.agentEvents.append({ level: 'error', kind: 'test.later', message: 'later' })
    expect(await running).toMatchObject({ exitCode: 0, err: '' })
    expect(shown).toHaveLength(3)
  })

  test('pair token puts the token alone on stdout', async () => {
    const { exitCode, out, err } = await run(['pair', 'token', '--host', 'dr.example', '--port', '7402'])
    expect({ exitCode, out }).toEqual({ exitCode: 0, out: `${secretToken}\n` })
    expect(err).toContain('in 15 min')
    expect(daemons.requests[0]).toMatchObject({ request: { body: { host: 'dr.example', port: 7402 } } })
    expect(await json(['pair', 'token'])).toEqual({ token: secretToken, expiresAtUnixMs: nowUnixMs + 900_000 })
  })

  test('pair join takes the token from standard input or a file', async () => {
    expect(await human(['pair', 'join'], { stdin: `${secretToken}\n` })).toContain('Paired with dr port 7402')
    expect(await human(['pair', 'join', '-'], { stdin: `\n  ${secretToken}` })).toContain('Recovery site  site-a')
    const file = join(dirname(daemons.pluginSocket), 'token')
    await writeFile(file, `${secretToken}\n`)
    expect(await json(['pair', 'join', '--token-file', file])).toEqual({ siteId: 'site-p', agentSiteId: 'site-a', address: 'dr port 7402' })
  })
})

describe('bad input says what and what to do, changes nothing, and exits with 2', () => {
  const cases: [string[], string][] = [
    [[], 'what is to be done was not said'],
    [['vpg'], 'what is to be done was not said'],
    [['frobnicate'], "unknown command 'frobnicate'"],
    [['vpg', 'create'], "missing required argument 'name'"],
    [['vpg', 'create', 'mail'], 'a VPG needs at least one VM'],
    [['vpg', 'create', 'mail', '--vm'], 'argument missing'],
    [['vpg', 'create', 'mail', '--vm', 'x'], '"x" is not a VM id'],
    [['vpg', 'create', 'mail', '--vm', '101', '101'], 'VM 101 is named twice'],
    [['vpg', 'create', 'mail', '--vm', '101', '--checkpoint-every', '10ms'], 'checkpoints every 10ms are not possible'],
    [['vpg', 'create', 'a/b', '--vm', '101'], '"a/b" cannot be the name of a VPG'],
    [['vpg', 'delete', '../x'], '"../x" cannot be the name'],
    [['sync', 'force'], "missing required argument 'vpg'"],
    [['sync', 'force', 'web', '--vm', 'x'], '"x" is not a VM id'],
    [['verify', '../x'], '"../x" cannot be the name'],
    [['vpg', 'list', 'surplus'], 'too many arguments'],
    [['vpg', 'list', '--colour'], "unknown option '--colour'"],
    [['status', 'a b'], '"a b" cannot be the name'],
    [['checkpoint', 'list', 'web', '--limit', '0'], '"0" is not a limit'],
    [['checkpoint', 'list', 'web', '--from', 'soon'], '"soon" is not a time'],
    [['checkpoint', 'list', 'web', '--from', 'now', '--to', '1h-ago'], '--from is after --to'],
    [['checkpoint', 'tag', 'web'], "missing required argument 'text'"],
    [['checkpoint', 'tag', 'web', ' '], 'the text of a tag'],
    [['point', 'open', 'web'], "missing required argument 'checkpoint'"],
    [['point', 'open', 'web', '26:00'], '"26:00" is not a time'],
    [['point', 'open', 'web', 'a b'], '"a b" is neither a checkpoint nor a time'],
    [['point', 'close', 'a/b'], '"a/b" is not the id'],
    [['events', '--side', 'left'], '"left" is not a side'],
    [['events', '--limit', 'x'], '"x" is not a limit'],
    [['pair', 'token', '--port', '99999'], '"99999" is not a port'],
    [['pair', 'token', '--host', 'a b'], '"a b" is not a host'],
    [['pair', 'join', secretToken], 'can be seen by every user'],
    [['pair', 'join'], 'no pairing token was given'],
    [['pair', 'join', '--token-file', '/nonexistent'], 'cannot read /nonexistent'],
  ]
  test.each(cases)('pvecdp %j', async (argv, message) => {
    const plain = await run(argv)
    expect(plain).toMatchObject({ exitCode: 2, out: '' })
    expect(plain.err).toMatch(/^error: [^\n]+\nhint: [^\n]+\n$/)
    expect(plain.err).toContain(message)
    const asJson = await run(['--json', ...argv])
    expect(asJson).toMatchObject({ exitCode: 2, err: '' })
    expect(JSON.parse(asJson.out)).toMatchObject({ error: { code: 'BAD_INPUT', message: expect.stringContaining(message), hint: expect.any(String) } })
    expect(daemons.requests).toEqual([])
    expect(plain.err + asJson.out).not.toContain(secretToken)
  })

  test('a token cut off or with something else around it is refused before it is sent', async () => {
    for (const stdin of [secretToken.slice(0, -8), `${secretToken} ${secretToken}`, 'hello', 'x'.repeat(10_000)]) {
      const { exitCode, err } = await run(['pair', 'join'], { stdin })
      expect(exitCode).toBe(2)
      expect(err).toMatch(/^error: [^\n]+\nhint: [^\n]+\n$/)
      expect(err).not.toContain(stdin)
    }
    expect(daemons.requests).toEqual([])
  })
})

describe('refused and unreachable', () => {
  test('what a daemon refuses exits with 1 and keeps its hint', async () => {
    expect(await run(['vpg', 'create', 'web', '--vm', '101'])).toEqual({
      exitCode: 1,
      out: '',
      err: 'error: there is a VPG web already\nhint: Choose another name.\n',
    })
    const { exitCode, out, err } = await run(['vpg', 'delete', 'nope', '--json'])
    expect({ exitCode, err }).toEqual({ exitCode: 1, err: '' })
    expect(JSON.parse(out)).toEqual({
      error: { code: 'NOT_FOUND', message: 'there is no VPG nope', hint: 'See what there is with: pvecdp status', context: { vpg: 'nope' } },
    })
    const other = formatToken({ ...parseToken(secretToken), secret: 'T'.repeat(43) })
    expect(await run(['pair', 'join'], { stdin: other })).toEqual({
      exitCode: 1,
      out: '',
      err: 'error: the agent refused the pairing: this token was used already\nhint: Make a new one at the recovery site: pvecdp pair token\n',
    })
  })

  test.each([
    [['vpg', 'list'], 'plugin'],
    [['point', 'list'], 'agent'],
    [['events', '--follow', '--side', 'agent'], 'agent'],
    [['status'], undefined],
    [['events'], undefined],
  ])('no daemon: pvecdp %j exits with 3', async (argv, side) => {
    const env = { PVECDP_PLUGIN_SOCKET: '/tmp/cdp-none-p.sock', PVECDP_AGENT_SOCKET: '/tmp/cdp-none-a.sock' }
    const { exitCode, out, err } = await run(argv, { env })
    expect({ exitCode, out }).toEqual({ exitCode: 3, out: '' })
    expect(err).toContain(side === undefined ? 'neither the plugin nor the agent runs on this machine' : `the ${side} is not running`)
    expect(err).toContain('systemctl start pve-cdp-')
    expect(JSON.parse((await run([...argv, '--json'], { env })).out)).toMatchObject({ error: { code: 'UNREACHABLE' } })
  })

  test('one daemon is enough for status and events; one that is there but dead is told', async () => {
    const dead = join(dirname(daemons.agentSocket), 'dead.sock')
    const server = createServer((socket) => socket.destroy()).listen(dead)
    await once(server, 'listening')
    try {
      expect(await run(['status', '--agent-socket', '/tmp/cdp-none.sock'])).toMatchObject({ exitCode: 0, err: '' })
      const half = await run(['status', '--agent-socket', dead])
      expect(half).toMatchObject({ exitCode: 3, out: expect.stringContaining('VPG web') })
      expect(half.err).toMatch(/^error: the agent broke off the conversation: [^\n]+\nhint: [^\n]+\n$/)
      expect(JSON.parse((await run(['status', '--agent-socket', dead, '--json'])).out)).toMatchObject({
        plugin: { side: 'plugin' },
        agent: null,
        errors: { agent: { code: 'UNREACHABLE' } },
      })
    } finally {
      server.close()
    }
  })

  test('a daemon that stops ends events --follow with 3', async () => {
    const own = await startFakeDaemons()
    try {
      own.agentEvents.append({ level: 'info', kind: 'test.first', message: 'first' })
      const seen = Promise.withResolvers<void>()
      const running = run(['events', '-f', '--side', 'agent', '--agent-socket', own.agentSocket], { onOut: () => seen.resolve() })
      await seen.promise
      await own.stopAgent()
      expect(await running).toMatchObject({ exitCode: 3, err: expect.stringContaining('the daemon stopped') })
    } finally {
      await own[Symbol.asyncDispose]()
    }
  })
})

describe('events --follow of two daemons', () => {
  test('tells at once that one is dead and goes on with the other', async () => {
    const dead = join(dirname(daemons.agentSocket), 'dead2.sock')
    const server = createServer((socket) => socket.destroy()).listen(dead)
    await once(server, 'listening')
    const interrupt = new AbortController()
    try {
      const lines: { side: string; error?: { code: string } }[] = []
      const outcome = await run(['events', '-f', '--json', '--agent-socket', dead], {
        signal: interrupt.signal,
        onOut: (text) => {
          lines.push(JSON.parse(text) as { side: string })
          if (lines.length === 2) interrupt.abort()
        },
      })
      expect(outcome).toMatchObject({ exitCode: 0, err: '' })
      expect(lines).toEqual(
        expect.arrayContaining([
          expect.objectContaining({ side: 'plugin', kind: 'capture.lost' }),
          { side: 'agent', error: expect.objectContaining({ code: 'UNREACHABLE' }) },
        ]),
      )
    } finally {
      interrupt.abort()
      server.close()
    }
  })
})

describe('the program', () => {
  const spawned = async (argv: string[], stdin = ''): Promise<Outcome> => {
    const child = spawn(process.execPath, [join(import.meta.dirname, 'main.ts'), ...argv], {
      env: { PATH: process.env['PATH'] ?? '', PVECDP_PLUGIN_SOCKET: daemons.pluginSocket, PVECDP_AGENT_SOCKET: daemons.agentSocket },
    })
    let out = ''
    let err = ''
    child.stdout.on('data', (chunk) => (out += String(chunk)))
    child.stderr.on('data', (chunk) => (err += String(chunk)))
    child.stdin.end(stdin)
    const [exitCode] = (await once(child, 'close')) as [number]
    return { exitCode, out, err }
  }

  test('runs, reads standard input, and ends with the exit code', async () => {
    const [version, help, joined, wrong] = await Promise.all([
      spawned(['--version']),
      spawned(['checkpoint', 'list', '--help']),
      spawned(['pair', 'join', '--json'], `${secretToken}\n`),
      spawned(['vpg', 'create', 'a/b', '--vm', '101']),
    ])
    expect(version).toMatchObject({ exitCode: 0, out: expect.stringMatching(/^\d+\.\d+\.\d+\n$/) })
    expect(help).toMatchObject({ exitCode: 0, out: expect.stringContaining('--limit') })
    expect(JSON.parse(joined.out)).toMatchObject({ agentSiteId: 'site-a' })
    expect(joined.exitCode).toBe(0)
    expect(wrong).toMatchObject({ exitCode: 2, out: '' })
  })

  test('Ctrl-C ends events --follow quietly', async () => {
    const child = spawn(
      process.execPath,
      [join(import.meta.dirname, 'main.ts'), 'events', '-f', '--plugin-socket', daemons.pluginSocket, '--agent-socket', daemons.agentSocket],
      { stdio: ['ignore', 'pipe', 'pipe'] },
    )
    await once(child.stdout, 'data')
    child.kill('SIGINT')
    expect(await once(child, 'close')).toEqual([0, null])
  })
})
