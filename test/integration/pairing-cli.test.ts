// pvecdp pair, as two operators use it: a pipe from one side to the other, and a terminal.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from '@jest/globals'
import { createPairingDesk } from '../../agent/pairing/index.ts'
import type { PairingDesk } from '../../agent/pairing/index.ts'
import { agentApi, createApi, EventLog, implement, pluginApi } from '../../core/api/index.ts'
import { listenSecure } from '../../core/link/index.ts'
import { silentLogger as log } from '../../core/log/index.ts'
import { loadOrCreateAuthority, loadOrCreateServerIdentity, loadOrCreateSiteId } from '../../core/pki/index.ts'
import { joinSite, loadPairing } from '../../plugin/pairing/index.ts'

let root: string
let stack: AsyncDisposableStack
let desk: PairingDesk
beforeEach(async () => {
  stack = new AsyncDisposableStack()
  root = await mkdtemp('/tmp/cdp-pc-')
  stack.defer(() => rm(root, { recursive: true, force: true }))
  const directory = join(root, 'agent')
  const authority = await loadOrCreateAuthority(directory, { name: 'recovery' })
  const own = stack.use(await createPairingDesk({ authority, agentSiteId: await loadOrCreateSiteId(directory), directory, log }))
  desk = own
  const tls = await loadOrCreateServerIdentity(directory, authority, { commonName: 'recovery' })
  const listener = stack.use(
    await listenSecure({
      host: '127.0.0.1',
      port: 0,
      tls,
      log,
      admit: (peer) => own.sites.admit(peer),
      onPair: (socket) => own.handle(socket),
      onStream: (socket) => socket.destroy(),
    }),
  )
  const createPairingToken = async ({ body }: { body: { host: string; port?: number } }): Promise<{ token: string; expiresAtUnixMs: number }> =>
    own.createToken({ host: body.host, port: body.port ?? listener.port })
  stack.use(
    await createApi({
      socketPath: join(root, 'a.sock'),
      log,
      events: new EventLog(),
      routes: implement({ token: agentApi.createPairingToken }, { token: createPairingToken }),
    }),
  )
  const pair = async ({ body, signal }: { body: { token: string }; signal: AbortSignal }) => {
    const pairing = await joinSite({ token: body.token, siteId: await loadOrCreateSiteId(join(root, 'plugin')), directory: join(root, 'plugin'), signal })
    return { siteId: pairing.siteId, agentSiteId: pairing.agentSiteId, address: `${pairing.host} port ${pairing.port}` }
  }
  stack.use(await createApi({ socketPath: join(root, 'p.sock'), log, events: new EventLog(), routes: implement({ pair: pluginApi.pair }, { pair }) }))
})
afterEach(() => stack.disposeAsync())

const sh = async (
  command: string,
  input = '',
  onOut: (text: string, write: (text: string) => void) => void = () => undefined,
): Promise<{ code: number; out: string }> => {
  const env = {
    ...process.env,
    NODE_OPTIONS: '',
    PVECDP: `${process.execPath} ${join(import.meta.dirname, '../../cli/main.ts')}`,
    PVECDP_PLUGIN_SOCKET: join(root, 'p.sock'),
    PVECDP_AGENT_SOCKET: join(root, 'a.sock'),
  }
  const child = spawn('bash', ['-o', 'pipefail', '-c', command], { env })
  let out = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk) => {
      out += String(chunk)
      onOut(out, (text) => void child.stdin.write(text))
    })
  }
  if (input !== '') child.stdin.end(input)
  const [code] = (await once(child, 'close')) as [number]
  return { code, out }
}

test('pvecdp pair token | pvecdp pair join', async () => {
  const { code, out } = await sh('$PVECDP pair token --host 127.0.0.1 | $PVECDP pair join')
  expect(out).toContain('Paired with 127.0.0.1 port')
  expect(code).toBe(0)
  const pairing = await loadPairing(join(root, 'plugin'))
  expect(desk.sites.list()).toMatchObject([{ siteId: pairing?.siteId }])
})

test('at a terminal the token is asked for and not shown', async () => {
  const token = (await sh('$PVECDP pair token --host 127.0.0.1 2>&-')).out.trim()
  let typed = false
  const { code, out } = await sh('exec script -qec "$PVECDP pair join" /dev/null', '', (text, write) => {
    if (typed || !text.includes('Token: ')) return
    typed = true
    write(`${token}\r`)
  })
  expect(out).toContain('Paired with')
  expect(out).not.toContain(token)
  expect(code).toBe(0)
  const again = await sh(`$PVECDP --json pair join`, `${token}\n`)
  expect(JSON.parse(again.out)).toMatchObject({ error: { code: 'PAIRING', message: expect.stringContaining('used already') } })
  expect(again.code).toBe(1)
})
