import type { LabVm } from '../lab/index.ts'

type Node = { 'node-name': string; drv: string; 'dirty-bitmaps'?: { name: string; recording: boolean }[] }
type Device = { qdev: string; inserted?: { 'node-name': string } }

/** What QEMU's block layer holds, as far as capture could leave something there. */
export type QemuState = { roots: string[]; nodes: string[]; jobs: string[]; exports: string[]; bitmaps: string[] }

/** Asked over the lab's own monitor. */
export const qemuState = async ({ monitor }: LabVm): Promise<QemuState> => {
  const nodes = (await monitor.run('query-named-block-nodes', { flat: true })) as Node[]
  const devices = (await monitor.run('query-block')) as Device[]
  const jobs = (await monitor.run('query-jobs')) as { id: string; type: string }[]
  const exports = (await monitor.run('query-block-exports')) as { id: string }[]
  return {
    roots: devices.map(({ qdev, inserted }) => `${qdev} ${inserted?.['node-name'] ?? ''}`).sort(),
    nodes: nodes.map((node) => `${node['node-name']} ${node.drv}`).sort(),
    jobs: jobs.map(({ id, type }) => `${id} ${type}`).sort(),
    exports: exports.map(({ id }) => id).sort(),
    bitmaps: nodes.flatMap((node) => (node['dirty-bitmaps'] ?? []).map(({ name, recording }) => `${node['node-name']} ${name}${recording ? ' recording' : ''}`)).sort(),
  }
}

/** Without what may be there for good: dirty bitmaps of ours. */
export const withoutBitmaps = ({ bitmaps, ...state }: QemuState): QemuState => ({ ...state, bitmaps: bitmaps.filter((bitmap) => !bitmap.includes(' cdp-bitmap-')) })
