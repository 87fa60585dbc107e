import { mkdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { makeExt4Image } from './disk-image.ts'
import { attachGuest, bootGuest } from './guest.ts'
import { pathsOf } from './node-files.ts'
import { commandLineOf, endProcess } from './process.ts'
import { startSiteDaemons, type RunningDaemon } from './site-daemons.ts'
import { attachVm, runningPid } from './vm.ts'
import type { LabVm } from './lab-vm.ts'
import type { VmShape } from './command-line.ts'

// npm run lab -- up|down|status [--root DIR] [--json]: two guests as on a Proxmox node, and the daemons of both sites.
// What was started stands in ROOT/lab/state.json; `down` ends nothing else.

type State = { rootDir: string; vms: { vmId: number; shape: VmShape; pid: number }[]; daemons: RunningDaemon[] }

const guests: { vmId: number; shape: VmShape }[] = [
  { vmId: 101, shape: '9.x' },
  { vmId: 102, shape: '8.4' },
]
const diskBytes = 256 << 20

const statePath = (rootDir: string): string => `${rootDir}/lab/state.json`

const readState = (rootDir: string): State | undefined =>
  statSync(statePath(rootDir), { throwIfNoEntry: false }) ? (JSON.parse(readFileSync(statePath(rootDir), 'utf8')) as State) : undefined

const writeState = (state: State): void => {
  mkdirSync(`${state.rootDir}/lab`, { recursive: true })
  writeFileSync(`${statePath(state.rootDir)}.new`, JSON.stringify(state, null, 2))
  renameSync(`${statePath(state.rootDir)}.new`, statePath(state.rootDir))
}

const up = async (rootDir: string): Promise<unknown> => {
  if (readState(rootDir)) throw new CdpError('CONFLICT', `a lab is up below ${rootDir}`, { hint: 'npm run lab -- down' })
  const state: State = { rootDir, vms: [], daemons: [] }
  writeState(state)
  const startedAt = performance.now()
  try {
    const booted = await Promise.allSettled(
      guests.map(async ({ vmId, shape }) => {
        const images = `${rootDir}/var/lib/vz/images/${vmId}`
        mkdirSync(images, { recursive: true })
        const disks = await Promise.all(
          [0, 1].map(async (index) => {
            const path = `${images}/vm-${vmId}-disk-${index}.raw`
            if (!statSync(path, { throwIfNoEntry: false })) await makeExt4Image(path, diskBytes)
            return { key: `scsi${index}`, path, format: 'raw' as const }
          }),
        )
        const onStarted = ({ pid }: LabVm): void => {
          state.vms.push({ vmId, shape, pid })
          writeState(state)
        }
        const guest = await bootGuest({ rootDir, vmId, shape, disks, agent: true, mount: ['scsi0', 'scsi1'], outliveParent: true, onStarted })
        guest.detach()
      }),
    )
    for (const outcome of booted) if (outcome.status === 'rejected') throw outcome.reason
    state.daemons = await startSiteDaemons(rootDir)
    writeState(state)
  } catch (error) {
    await down(rootDir)
    throw error
  }
  return { ...(status(rootDir) as object), startMs: Math.round(performance.now() - startedAt) }
}

const down = async (rootDir: string): Promise<unknown> => {
  const state = readState(rootDir)
  if (!state) return { rootDir, up: false, stopped: [] }
  const stopped: { vmId: number; graceful: boolean }[] = []
  for (const { pid, command } of state.daemons.toReversed()) if (commandLineOf(pid)?.join(' ') === command.join(' ')) await endProcess(pid)
  await Promise.allSettled(
    state.vms.map(async ({ vmId, pid }) => {
      if (runningPid(rootDir, vmId) !== pid) return
      const vm = await attachVm(rootDir, vmId)
      stopped.push({ vmId, graceful: await vm.stop() })
    }),
  )
  rmSync(statePath(rootDir), { force: true })
  return { rootDir, up: false, stopped }
}

const status = (rootDir: string): unknown => {
  const state = readState(rootDir)
  return {
    rootDir,
    up: state !== undefined,
    vms: (state?.vms ?? []).map(({ vmId, shape, pid }) => {
      const { qmp, serial0, qga, config, monitor } = pathsOf(rootDir, vmId)
      return { vmId, shape, pid, running: runningPid(rootDir, vmId) === pid, qmp, serial0, qga, config, monitor }
    }),
    daemons: (state?.daemons ?? []).map((daemon) => ({ ...daemon, running: commandLineOf(daemon.pid)?.join(' ') === daemon.command.join(' ') })),
  }
}

/** npm run lab -- run 101 'ls /mnt': a command in a guest. */
const run = async (rootDir: string, vmId: string | undefined, script: string | undefined): Promise<unknown> => {
  if (!vmId || script === undefined) throw new CdpError('BAD_INPUT', 'run needs a VM id and a command', { hint: "npm run lab -- run 101 'ls /mnt/scsi0'" })
  const guest = await attachGuest(rootDir, Number(vmId))
  try {
    return await guest.run(script)
  } finally {
    guest.detach()
  }
}

const print = (value: unknown, json: boolean): void => {
  console.log(json ? JSON.stringify(value) : JSON.stringify(value, null, 2))
}

const main = async (): Promise<void> => {
  const { values, positionals } = parseArgs({ allowPositionals: true, options: { root: { type: 'string', default: '/tmp/cdp-lab' }, json: { type: 'boolean', default: false } } })
  const [command, ...rest] = positionals
  if (command === 'up') return print(await up(values.root), values.json)
  if (command === 'down') return print(await down(values.root), values.json)
  if (command === 'status') return print(status(values.root), values.json)
  if (command === 'run') return print(await run(values.root, rest[0], rest[1]), values.json)
  throw new CdpError('BAD_INPUT', `unknown command ${command ?? '(none)'}`, { hint: 'npm run lab -- up|down|status|run [--root DIR] [--json]' })
}

try {
  await main()
} catch (error) {
  console.error(`lab: ${errorMessage(error)}`)
  if (error instanceof CdpError && error.hint) console.error(`hint: ${error.hint}`)
  process.exitCode = 1
}
