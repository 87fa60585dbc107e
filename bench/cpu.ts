import type { Figure } from './figure.ts'

/** CPU time of the processes over one round of each way. */
export type CpuSample = { load: string; capturedBytes: number; pluginSeconds: number; agentSeconds: number; referenceBytes: number; nbdkitSeconds: number }

const GIB = 1024 ** 3

const perGiB = (samples: readonly CpuSample[], seconds: (sample: CpuSample) => number, bytes: (sample: CpuSample) => number): number =>
  samples.reduce((sum, sample) => sum + seconds(sample), 0) / (samples.reduce((sum, sample) => sum + bytes(sample), 0) / GIB)

/** CPU seconds per GiB captured, over the rounds of 4 KiB writes at depth 32 and of 1 MiB writes; the agent's with sealing and merging to their end. */
export const cpuFigures = (samples: readonly CpuSample[], quick: boolean): Figure[] => {
  if (samples.length === 0) return []
  const byLoad = (seconds: (sample: CpuSample) => number): string =>
    [...Map.groupBy(samples, ({ load }) => load)].map(([load, group]) => `${load.replace('path.', '')} ${perGiB(group, seconds, ({ capturedBytes }) => capturedBytes).toFixed(2)}`).join(', ')
  const nbdkit = perGiB(samples, ({ nbdkitSeconds }) => nbdkitSeconds, ({ referenceBytes }) => referenceBytes)
  const plugin = perGiB(samples, ({ pluginSeconds }) => pluginSeconds, ({ capturedBytes }) => capturedBytes)
  const agent = perGiB(samples, ({ agentSeconds }) => agentSeconds, ({ capturedBytes }) => capturedBytes)
  const unit = 'CPU s/GiB'
  const reduced = quick ? { reduced: true } : {}
  return [
    { name: 'cpu.plugin', value: plugin, unit, reference: null, ratio: null, ...reduced, note: byLoad(({ pluginSeconds }) => pluginSeconds) },
    { name: 'cpu.agent', value: agent, unit, reference: nbdkit, ratio: nbdkit / agent, against: 'nbdkit file over TLS, which keeps no history', ...reduced, note: byLoad(({ agentSeconds }) => agentSeconds) },
  ]
}
