import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../core/errors/index.ts'
import type { Bench, BenchOptions, Figure } from './figure.ts'
import { AgentSide } from './rig/agent-side.ts'
import { BUDGET_BYTES, mib } from './rig/budget.ts'
import { IDLE_DISK_BYTES, IdleDisks } from './rig/idle-disks.ts'
import { PluginSide } from './rig/plugin-side.ts'
import { ownBytesOf } from './rig/proc.ts'

const NAME = 'memory.perIdleVm'
const TARGET_MIB = 25
const FIRST_VM = 600
/** Idle for so long: what is kept while there is work (slabs, sealing threads) is given back by then. */
const REST_MS = 30_000
const QUICK_REST_MS = 5_000

/** What one more protected VM that does next to nothing costs the plugin: its worker, QEMU's connection, its stream to the agent. */
const run = async ({ quick, say, scratchDirectory: socketDirectory, diskDirectory, signal }: BenchOptions): Promise<Figure[]> => {
  const count = quick ? 10 : 100
  await using stack = new AsyncDisposableStack()
  stack.defer(() => rm(join(diskDirectory, 'idle'), { recursive: true, force: true }))
  const disks = stack.use(await IdleDisks.start(socketDirectory))
  const agent = stack.use(await AgentSide.start({ socketDirectory, diskDirectory: join(diskDirectory, 'idle') }))
  const plugin = stack.use(await PluginSide.start())
  const protect = async (number: number): Promise<void> => {
    signal.throwIfAborted()
    const vm = String(FIRST_VM + number)
    const targetPath = join(socketDirectory, `${vm}.sock`)
    await plugin.capture({ vm, targetPath, sizeBytes: IDLE_DISK_BYTES, budgetBytes: BUDGET_BYTES, pairing: agent.pairing })
    await disks.add(number, targetPath)
    await (quick ? disks.write(number) : disks.burst(number))
    await plugin.checkpoint(vm)
  }
  const [none, agentWithNone] = [ownBytesOf(plugin.pid), ownBytesOf(agent.pid)]
  for (let number = 0; number < count; number++) await protect(number)
  for (let number = 0; number < count; number++) await disks.write(number)
  await delay(quick ? QUICK_REST_MS : REST_MS, undefined, { signal })
  if ((await disks.mirrored()) !== count) throw new CdpError('CONFLICT', `only ${await disks.mirrored()} of ${count} VMs are still captured`)
  const all = ownBytesOf(plugin.pid)
  const value = (all - none) / count / 2 ** 20
  const agentPerVm = (ownBytesOf(agent.pid) - agentWithNone) / count
  say(`${NAME}: ${mib(none)} MiB without a VM, ${mib(all)} with ${count}`)
  return [{
    name: NAME, value, unit: 'MiB', reference: TARGET_MIB, ratio: TARGET_MIB / value, against: 'the target', ...(quick ? { reduced: true } : {}),
    note: `plugin process without a VM ${mib(none)} MiB, with ${count} ${mib(all)}${quick ? '' : ', each idle after a burst of 12 MiB'}; at the agent ${(agentPerVm / 2 ** 20).toFixed(1)} MiB each`,
  }]
}

export const idleVmsBench: Bench = { names: [NAME], run }
