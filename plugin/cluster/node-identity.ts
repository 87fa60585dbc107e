import { createKeyPair, issueCertificate } from '../../core/pki/index.ts'
import type { Authority, TlsIdentity } from '../../core/pki/index.ts'

const VALID_FOR_MS = 3650 * 86_400_000

/** Who this node is towards the others: a certificate for each direction, signed by the authority of the cluster. */
export type NodeIdentity = { server: TlsIdentity; client: TlsIdentity }

/** Issued anew at each start and kept in memory only: nothing to renew, nothing to steal from this node's disk. */
export const issueNodeIdentity = async (authority: Authority, nodeName: string): Promise<NodeIdentity> => {
  const issue = async (usage: 'server' | 'client'): Promise<TlsIdentity> => {
    const { privateKeyPem, publicKeyPem } = await createKeyPair()
    const certificatePem = await issueCertificate(authority, { commonName: nodeName, publicKeyPem, usage, validForMs: VALID_FOR_MS })
    return { certificatePem, privateKeyPem, authorityPem: authority.certificatePem }
  }
  return { server: await issue('server'), client: await issue('client') }
}
