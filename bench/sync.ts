import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { tool } from '../test/lab/index.ts'
import { figureOf, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { AgentSide } from './rig/agent-side.ts'
import { PluginSide } from './rig/plugin-side.ts'
import { BASE_EXPORT, SourceDisk } from './rig/source-disk.ts'

const NAME = 'sync.initial'
const MIB = 2 ** 20
const BUDGET_BYTES = 64 * MIB

/** The initial sync of a full disk, until its end is durable in the mirror, against nbdcopy of the same export into nothing. */
const run = async ({ quick, say, scratchDirectory: socketDirectory, diskDirectory, signal }: BenchOptions): Promise<Figure[]> => {
  const sizeBytes = (quick ? 512 : 2048) * MIB
  await using stack = new AsyncDisposableStack()
  stack.defer(() => rm(join(diskDirectory, 'sync'), { recursive: true, force: true }))
  const source = stack.use(await SourceDisk.start(socketDirectory, 'sync', sizeBytes, { filled: true }))
  const agent = stack.use(await AgentSide.start({ socketDirectory, diskDirectory: join(diskDirectory, 'sync') }))
  const plugin = stack.use(await PluginSide.start())
  const rounds: { ours: number; reference: number }[] = []
  for (let round = 0; round < (quick ? 1 : 3); round++) {
    const copyStartedMs = performance.now()
    await tool('nbdcopy', [`nbd+unix:///${BASE_EXPORT}?socket=${source.nbdPath}`, 'null:'], { deadlineMs: 300_000, signal })
    const reference = sizeBytes / MIB / ((performance.now() - copyStartedMs) / 1000)

    const vm = String(400 + round)
    await plugin.capture({ vm, targetPath: join(socketDirectory, `${vm}.sock`), sizeBytes, budgetBytes: BUDGET_BYTES, pairing: agent.pairing }, { copy: true })
    const startedMs = performance.now()
    const { lastSeq } = await plugin.copy(vm, source.nbdPath, sizeBytes)
    await agent.untilDurable(vm, lastSeq)
    const ours = sizeBytes / MIB / ((performance.now() - startedMs) / 1000)
    await plugin.release(vm)
    await agent.untilIdle()
    rounds.push({ ours, reference })
    say(`${NAME} round ${round}: ours ${ours.toFixed(0)} MiB/s, nbdcopy ${reference.toFixed(0)}; held at most ${(plugin.news(vm).peakBytes / MIB).toFixed(0)} MiB`)
    await rm(agent.vmDirectory(vm), { recursive: true, force: true })
  }
  return [{ ...figureOf(NAME, 'MiB/s', 'more is better', rounds, 'nbdcopy of the same export into null'), ...(quick ? { reduced: true } : {}), note: `${sizeBytes / MIB} MiB of data, durable in the mirror` }]
}

export const syncBench: Bench = { names: [NAME], run }
